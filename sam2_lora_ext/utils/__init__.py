"""Utilities for every folder: errors, files, folders. Imports nothing else of the package."""
