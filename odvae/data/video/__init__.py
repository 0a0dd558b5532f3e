"""Video and image files to uint8 frames and back."""
