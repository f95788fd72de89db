"""Folders and tables of scans: listed, hashed, checked for near duplicates and split."""
