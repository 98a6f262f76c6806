"""Other code by its names: tomesd (`compat.tomesd`), and the published BiGain code, its functions and its rules."""
