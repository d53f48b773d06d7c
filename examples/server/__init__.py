"""An HTTP server over a diffusers pipeline under a plan."""
