"""Defines what can be configured: YAML groups, the dataclasses that check them, and arithmetic that launcher and jobs share.

May import the standard library and omegaconf only.
"""
