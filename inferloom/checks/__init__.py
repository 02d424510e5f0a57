"""What proves a pass: `inferloom check-pass`."""
