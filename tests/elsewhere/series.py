"""Forecasting networks and networks on graphs."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.elsewhere.case import Call, Case, floats

EDGES = Call("torch.tensor", [[0, 1, 2, 3, 4, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
NODES = floats(6, 8)
WINDOW: dict[str, Any] = {
    "insample_y": floats(2, 16, 1),
    "insample_mask": Call("torch.ones", 2, 16, 1),
    "outsample_mask": Call("torch.ones", 2, 4, 1),
    "hist_exog": None,
    "futr_exog": None,
    "stat_exog": None,
}
SEVERAL = {**WINDOW, "insample_y": floats(2, 16, 3), "insample_mask": Call("torch.ones", 2, 16, 3)}


def forecast(name: str, steps: int, several: bool = False, /, long: int = 0, cannot: str = "", **options: Any) -> Case:
    options = {"n_series": 3} | options if several else options
    return Case(
        Call(f"neuralforecast.models.{name}", h=4, input_size=16, **options),
        (SEVERAL if several else WINDOW,),
        steps,
        long,
        cannot=cannot,
    )


class Graph(nn.Module):
    """Layers of torch-geometric in a row, each with the residual that its papers put around it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x, edges))
        return x


def residual(name: str, *args: Any, **options: Any) -> Case:
    layers = [Call(f"torch_geometric.nn.{name}", *args, **options) for _ in range(2)]
    return Case(Call("tests.elsewhere.series.Graph", layers), (NODES, EDGES), 2, name=f"residual {name}")


# fmt: off
PACKAGES = {
    "neuralforecast": [
        forecast("NBEATS", 3, mlp_units=3 * [[16, 16]]),
        forecast("NHITS", 3, mlp_units=3 * [[16, 16]]),
        forecast("NBEATSx", 3, mlp_units=3 * [[16, 16]]),
        forecast("PatchTST", 4, hidden_size=16, n_heads=2, linear_hidden_size=24, encoder_layers=2, patch_len=4,
            stride=4),
        forecast("TFT", 9, cannot="float64", hidden_size=16, n_head=2, long=1),
        forecast("VanillaTransformer", 7, hidden_size=16, n_head=2, conv_hidden_size=16, encoder_layers=2,
            decoder_layers=1),
        forecast("Informer", 7, hidden_size=16, n_head=2, conv_hidden_size=16, encoder_layers=2, decoder_layers=1),
        forecast("Autoformer", 7, hidden_size=16, n_head=2, conv_hidden_size=16, encoder_layers=2, decoder_layers=1),
        forecast("FEDformer", 7, cannot="float64", hidden_size=16, n_head=8, conv_hidden_size=16,
            encoder_layers=2,
            decoder_layers=1, modes=4),
        forecast("iTransformer", 4, True, hidden_size=16, n_heads=2, d_ff=24, e_layers=2),
        forecast("TSMixer", 4, True, n_block=2, ff_dim=8),
        forecast("TSMixerx", 1 + 3 * 2, True, n_block=2, ff_dim=8),
        # Its norm over one feature gives a constant: nothing before it would have an effect.
        forecast("TiDE", 4, hidden_size=16, decoder_output_dim=4, temporal_decoder_dim=8, num_encoder_layers=2,
            layernorm=False, long=1),
        forecast("TimesNet", 2, hidden_size=16, conv_hidden_size=16, encoder_layers=2, top_k=2),
        forecast("TimeMixer", 0, True, d_model=16, d_ff=16, e_layers=2),
        forecast("TimeXer", 6, True, patch_len=4, hidden_size=16, n_heads=2, e_layers=2, d_ff=16),
        forecast("SOFTS", 4, True, hidden_size=16, d_core=8, e_layers=2, d_ff=16),
        forecast("BiTCN", 4, hidden_size=8),
        forecast("StemGNN", 0, True),
        forecast("TCN", 0, encoder_hidden_size=8, decoder_hidden_size=8, context_size=4),
        forecast("DLinear", 0),
        forecast("NLinear", 0),
        forecast("MLP", 0, hidden_size=16),
    ],
    "torch_geometric": [
        residual("GCNConv", 8, 8),
        residual("GATConv", 8, 4, heads=2),
        residual("GATv2Conv", 8, 4, heads=2),
        residual("SAGEConv", 8, 8),
        residual("GraphConv", 8, 8),
        residual("GINConv", Call("torch.nn.Linear", 8, 8)),
        residual("TransformerConv", 8, 4, heads=2),
        residual("ResGatedGraphConv", 8, 8),
        residual("GENConv", 8, 8),
        residual("ChebConv", 8, 8, 2),
        residual("TAGConv", 8, 8, K=2),
        residual("SGConv", 8, 8),
        residual("ARMAConv", 8, 8),
        Case(Call("torch_geometric.nn.DeepGCNLayer", Call("torch_geometric.nn.GENConv", 8, 8),
            Call("torch.nn.LayerNorm", 8), Call("torch.nn.ReLU")), (NODES, EDGES), 1),
        Case(Call("torch_geometric.nn.GraphUNet", 8, 8, 4, 2), (NODES, EDGES), 0, long=1),
        Case(Call("torch_geometric.nn.GPSConv", 8, Call("torch_geometric.nn.GCNConv", 8, 8), heads=2), (NODES, EDGES),
            3),
        Case(Call("torch_geometric.nn.GCN", 8, 8, 2), (NODES, EDGES), 0),
        Case(Call("torch_geometric.nn.GraphSAGE", 8, 8, 2), (NODES, EDGES), 0),
    ],
}
# fmt: on
