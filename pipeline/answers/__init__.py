"""Answers that somebody gave already: predictions of any model, or of people, joined to the images of a data set.

Read (`reading`), understood (`forms`), joined by key or by shard and row (`join`), and stored by shard (`importing`,
`store`), so that the pool stages take them where they would ask a network.
"""
