"""Floor 2: what describes a deployment (model, hardware, engine arguments, accelerator model), and its library."""
