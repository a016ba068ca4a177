"""What the check costs, side by side with what people use today: `make bench`."""
