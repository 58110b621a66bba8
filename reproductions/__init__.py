"""The paper's experiments, run with eulernet: every network is an ordinary model, patched by `eulernet.patch`.

The paper is *Towards Robust ResNet: A Small Step but a Giant Leap* (Zhang et al., IJCAI 2019, arXiv 1902.10887).

    python -m reproductions --help
"""
