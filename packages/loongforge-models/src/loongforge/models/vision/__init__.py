"""Vision encoders and projectors, and what they share."""
