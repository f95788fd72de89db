"""Results as DICOM objects, in a folder or in the PACS that the scans came from."""
