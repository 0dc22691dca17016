"""What a trained network does: routing by class, and plots."""
