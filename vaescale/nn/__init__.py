"""Building blocks, likelihoods and quantisers in plain torch, independent of models, data and files."""
