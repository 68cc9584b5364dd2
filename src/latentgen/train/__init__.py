"""The training loop. It knows stages, updates and states; it imports no network, prior, loss or method."""
