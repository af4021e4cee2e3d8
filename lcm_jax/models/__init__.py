"""A network, its autoencoder and its text encoders, bound: what pipelines, streams and trainings share."""
