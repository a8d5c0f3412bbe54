"""The two-moons experiment: 2,000 points, six labels, networks of two hidden layers with 8 units.

Source: arXiv:2003.10580v1, figures 1 and 8; CVPR 2021, section 3.1.
"""
