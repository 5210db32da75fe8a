"""What leaves the house: Jetson and desktop packaging."""
