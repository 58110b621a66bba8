"""The paper's experiments, run with eulernet: every network is an ordinary model, patched by `eulernet.patch`.

The paper is *Towards Robust ResNet: A Small Step but a Giant Leap* (Zhang et al., IJCAI 2019, arXiv 1902.10887).

    python -m reproductions --help

A study is a grid of trials (`trial`), each one training (`train`) on data that lie on the device (`sources`). `grid`
runs what has no record yet; `claims` and `report` say what the records show. One module a study: `depth`, `dynamics`,
`noise`, `select`, `robust`, `finetune`; `euler`, `two_moon`, `bounds` and `cifar10` are no grids. How large: `scales`.
What came out: `results/REPORT.md`. What is left to run on a GPU: `campaign.md`.
"""
