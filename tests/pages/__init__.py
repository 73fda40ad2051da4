"""Tests of the folder pages."""
