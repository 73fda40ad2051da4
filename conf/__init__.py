"""Defines what can be configured: the YAML groups, the dataclasses that check them, and arithmetic that both sides of a launch share.

May import the standard library and omegaconf only.
"""
