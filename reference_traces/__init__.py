"""The catalogue of public traces, and the captures that come with the package."""
