"""What the page and the routes of the server tell of models and devices, and what they may ask for."""
