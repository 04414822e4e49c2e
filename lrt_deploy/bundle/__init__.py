"""What a bundle is: the contract of its graphs, its manifest, precisions, engines, and where its weights lie."""
