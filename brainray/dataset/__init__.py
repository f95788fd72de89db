"""Folders and tables of scans: found, scanned for twins, split, and streamed by Ray Data."""
