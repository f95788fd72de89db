"""Bulk outputs and their scans without identity, for research."""
