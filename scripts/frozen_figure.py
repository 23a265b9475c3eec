"""Exits beside frozen weights in one figure: seconds, a sentence, distance
against layers.

    python scripts/frozen_figure.py --model=FOLDER
        --fit=runs/plain-debian_synopsis-frozen \\
        --rows=synopsis_validation.jsonl

decodes the rows over a grid in four ways (raw exits, translators, translators
with learned propagation, the decoder cut after a layer), writes
scripts/figures/frozen_exits.json, and draws scripts/figures/frozen_exits.png.
Without arguments it draws again from that file.
"""

import argparse
import json
import pathlib
import tempfile
from typing import Any

from calm import exits, inference, storage
from calm.calibrate import Prompt, metrics
from calm.calibrate import losses as sequence_losses
from calm.data import prompt_files
from calm.inference import grid, outputs

FOLDER = pathlib.Path(__file__).parent
CURVES = FOLDER / "figures" / "frozen_exits.json"
FIGURE = FOLDER / "figures" / "frozen_exits.png"
THRESHOLDS = (0.95, 0.8, 0.65, 0.5, 0.35, 0.2)
PROMPTS = 128


def measure(
  model: pathlib.Path, fit: pathlib.Path, rows: pathlib.Path
) -> dict[str, Any]:
  """Mean layers and mean distance of every way, and what the fit found.

  Args:
    model: folder of the given model.
    fit: folder that `calm fit` made of it.
    rows: prompts that the fit did not see.
  """
  examples = prompt_files.open_prompts(rows)[:PROMPTS]
  prompts = [Prompt(example.id, example.input) for example in examples]
  result = json.loads((fit / "fit" / "result.json").read_text("utf-8"))
  tried = result["choice"]["tried"][result["choice"]["chosen"] or 0][
    "candidate"
  ]
  layers = tuple(tried["exit_layers"])
  metric = result["options"]["metric"]
  served = inference.load(fit, void_guarantee=True)
  limits = ("task_prefix", "max_input_length", "max_decode_length")
  given = inference.load(
    model,
    void_guarantee=True,
    **{name: getattr(served.options, name) for name in limits},
  )
  ways = {
    "raw exits": (given, "exit_state"),
    "translators": (served, "exit_state"),
    "translators, learned propagation": (served, "learned"),
  }
  bulk = grid.in_bulk(given)
  full = grid.with_rule(bulk, prompts, exits.StaticExit())
  curves = {}
  for name, (way, propagation) in ways.items():
    options = {
      "measure": "softmax",
      "exit_layers": layers,
      "propagation": propagation,
    }
    decoder = grid.in_bulk(way.with_options(**options))
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      cached = grid.on_grid(decoder, prompts, THRESHOLDS, path, full=full)
      losses = sequence_losses.compute(cached, "textual", metric=metric).values
      depths = [outputs.mean_layers(records) for records in cached.records]
    curves[name] = [depths, losses.mean(axis=0).tolist()]
  decoder = grid.in_bulk(served)
  cut = ([], [])
  for layer in range(2, served.num_layers):
    records = grid.with_rule(decoder, prompts, exits.StaticExit(layer))
    pairs = [
      (a.prediction, (b.prediction,))
      for a, b in zip(records, full, strict=True)
    ]
    alike = metrics.compute(metrics.get_metric(metric), pairs)
    cut[0].append(layer)
    cut[1].append(float(1.0 - alike.mean()))
  curves["cut decoder"] = cut
  panel = result["panel"]
  _, at = panel["promised"][panel["first"]]
  texts = [item["levels"][at] for item in panel["items"]]
  pieces = [text for text in texts if 5 <= len(text["pieces"]) <= 14] or texts
  return {
    "num_layers": served.num_layers,
    "num_prompts": len(prompts),
    "tolerance": result["options"]["tolerance"],
    "metric": metric,
    "exit_layers": layers,
    "curves": curves,
    "seconds": result["seconds"],
    "learning": result["learned"]["seconds"],
    "example": {name: pieces[0][name] for name in ("pieces", "exit_layers")},
  }


def draw(found: dict[str, Any], output: pathlib.Path = FIGURE) -> None:
  """Bars of seconds and the curves side by side, the sentence below."""
  from matplotlib import figure as mpl_figure
  from matplotlib.backends import backend_agg

  figure = mpl_figure.Figure(figsize=(8.4, 4.2), dpi=160)
  backend_agg.FigureCanvasAgg(figure)  # measures texts
  grid = figure.add_gridspec(2, 2, height_ratios=(9, 1), width_ratios=(2, 3))
  grid.update(
    left=0.07, right=0.99, top=0.95, bottom=0.03, hspace=0.32, wspace=0.18
  )
  bars = figure.add_subplot(grid[0, 0])
  curve = figure.add_subplot(grid[0, 1])
  single = found["seconds"]["single"]
  batched = found["seconds"]["batched"]
  pairs = {"one at a time": single, "in batches": batched}
  named = [(name, pair) for name, pair in pairs.items() if pair]
  for place, (_, pair) in enumerate(named):
    heights = (pair["full"], pair["early"])
    shown = bars.bar(
      [3 * place, 3 * place + 1], heights, 0.95, color=("#bbbbbb", "#0077aa")
    )
    bars.bar_label(
      shown, labels=("full depth", "served"), fontsize=8, padding=2
    )
    look: dict[str, Any] = {
      "ha": "center",
      "va": "center",
      "color": "white",
      "weight": "bold",
    }
    bars.text(
      3 * place + 1,
      pair["early"] / 2,
      f"×{pair['speedup']:.2f}",
      fontsize=11,
      **look,
    )
  bars.set_xticks(
    [3 * place + 0.5 for place in range(len(named))],
    [name for name, _ in named],
  )
  bars.tick_params(axis="x", length=0)
  bars.set(ylabel="decoder, ms a prompt")
  colours = {
    "raw exits": "#dd6600",
    "cut decoder": "#775555",
    "translators": "#889966",
  }
  for marker, (name, (layers, distances)) in zip(
    "^so*", found["curves"].items(), strict=True
  ):
    colour = colours.get(name, "#0077aa")
    curve.plot(
      layers,
      distances,
      marker=marker,
      color=colour,
      linewidth=1.4,
      markersize=5,
    )
    end = max(range(len(layers)), key=lambda i: distances[i])
    # To the left of a line's worse end, where no other line is; one all but
    # covers another.
    below = name == "translators, learned propagation"
    offset = (
      (-6, -31) if below else (6, 2) if name == "cut decoder" else (-7, 0)
    )
    look = {
      "color": colour,
      "fontsize": 8,
      "ha": "left" if name == "cut decoder" else "right",
    }
    curve.annotate(
      name.replace(", ", ",\n"),
      (layers[end], distances[end]),
      offset,
      textcoords="offset points",
      **look,
    )
  curve.axhline(
    found["tolerance"], color="#111213", linestyle=":", linewidth=0.9
  )
  level = found["tolerance"]
  by_height = curve.get_yaxis_transform()
  curve.text(0.01, level + 0.01, "promised", transform=by_height, fontsize=8)
  curve.set(
    xlabel="mean decoder layers a token",
    ylabel="distance to full depth's texts",
  )
  for axes in (bars, curve):
    axes.spines[["top", "right"]].set_visible(False)
  sentence(figure.add_subplot(grid[1, :]), found)
  figure.savefig(output, facecolor="white", metadata={"Software": None})


def sentence(axes, found: dict[str, Any]) -> None:
  """A text of the last part, each piece on the colour of its layer, the layer
  above it.
  """
  axes.axis("off")
  axes.set(xlim=(0, 1), ylim=(-0.3, 1.6), autoscale_on=False)
  colours = outputs.scale(found["num_layers"])
  start = 0.0
  for piece, layer in zip(*found["example"].values(), strict=True):
    colour = colours[layer - 1]
    text = piece.replace(chr(0x2581), " ")
    ink = outputs.text_colour(colour)
    words = axes.text(start, 0.1, text, fontsize=12, color=ink)
    box = words.get_window_extent(axes.figure.canvas.get_renderer())
    width = box.transformed(axes.transData.inverted()).width
    axes.barh(0.3, width, 1.1, start, color=colour)
    axes.text(
      start + width / 2,
      1.1,
      f"{layer}",
      fontsize=8,
      ha="center",
      color="#555555",
    )
    start += width
  of_all = f"decoder layers of each token, of {found['num_layers']}"
  axes.text(start + 0.02, 0.1, of_all, fontsize=8)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--model", type=pathlib.Path, help="folder of the given model"
  )
  parser.add_argument(
    "--fit", type=pathlib.Path, help="folder that calm fit made of it"
  )
  parser.add_argument(
    "--rows", type=pathlib.Path, help="prompts that the fit did not see"
  )
  arguments = parser.parse_args()
  if arguments.fit is not None:
    found = measure(arguments.model, arguments.fit, arguments.rows)
    storage.write_atomically(
      CURVES, json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    )
  draw(json.loads(CURVES.read_text("utf-8")))


if __name__ == "__main__":
  main()
