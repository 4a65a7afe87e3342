"""An artifact on its way: the file it grows in, and the pace it comes at. Light: workers read part files too."""
