"""What one run is assembled from and what it writes to its folder."""
