"""What people type: one noun or verb per file."""
