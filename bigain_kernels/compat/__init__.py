"""Rules of other code, by name: what the published BiGain code does differently, and a tomesd-shaped API."""
