"""fastssl-convert: any source of images -> one .beton."""
