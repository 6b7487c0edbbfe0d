"""Measures the real pool over real memory nodes, for ``polarkv bench`` and ``polarkv doctor``."""
