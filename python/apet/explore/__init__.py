"""`apet explore`: a local web page that shows what is kept of a photo or clip, and the drawing that it shares with the
HTML report of `apet compress`. The design is in docs/explore.md."""
