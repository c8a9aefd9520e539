"""`apet explore`: a local web page that shows which tokens of a photo or clip are kept. The HTML report of `apet
compress` shares its drawings. docs/explore.md describes the design."""
