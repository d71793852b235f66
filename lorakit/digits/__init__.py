"""The experiment of the talk on handwritten digits."""
