"""What every folder may use: errors, files, folders. Imports nothing else of the package."""
