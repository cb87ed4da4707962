"""What a running mount says about itself: status, metrics, and the control socket."""
