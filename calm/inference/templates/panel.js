"use strict";
// Shows the outputs of a panel at the threshold of its tolerance, or at one that was chosen by hand.
for (const panel of document.querySelectorAll("[data-panel]")) {
  const data = JSON.parse(panel.querySelector("script.data").textContent);
  const find = (name) => panel.querySelector("." + name);
  const slider = find("slider"), promised = find("promised"), measure = find("measure");
  const number = (value, digits) => value === null ? "–" : value.toFixed(digits);

  function show() {
    const chosen = data[measure.value], at = Number(slider.value);
    const threshold = chosen.thresholds[at];
    find("threshold").textContent = threshold;
    slider.setAttribute("aria-valuetext", threshold);
    let layers = 0, tokens = 0;
    panel.querySelectorAll(".example").forEach((example, i) => {
      const level = chosen.items[i][at];
      const spans = level.pieces.map((piece, t) => {
        const span = document.createElement("span");
        const layer = level.exit_layers[t];
        span.className = "k k" + layer;
        span.dataset.l = layer;
        span.title = "layer " + layer + ", confidence " + number(level.confidences[t], 2);
        span.textContent = piece;
        layers += layer;
        tokens += 1;
        return span;
      });
      example.querySelector(".tokens").replaceChildren(...spans);
      example.querySelector(".d").textContent = number(level.distance, 2);
      example.querySelector(".r").textContent = number(level.risk_difference, 2);
      example.querySelector(".m").textContent = number(level.layers, 2);
    });
    find("overall").textContent = tokens ? number(layers / tokens, 2) + " layers a token" : "–";
  }

  function promise() {
    const chosen = data[measure.value], [tolerance, at, text] = chosen.promised[promised.value];
    slider.max = chosen.thresholds.length - 1;
    slider.value = at;
    find("tolerance").textContent = tolerance;
    promised.setAttribute("aria-valuetext", tolerance);
    find("promise").textContent = text;
    show();
  }

  measure.addEventListener("change", () => {
    promised.max = data[measure.value].promised.length - 1;
    promised.value = data[measure.value].first;
    promise();
  });
  promised.addEventListener("input", promise);
  slider.addEventListener("input", () => {
    find("tolerance").textContent = "–";
    find("promise").textContent = "chosen by hand: no promise";
    show();
  });
  find("numbers").addEventListener("change", (event) => {
    panel.classList.toggle("numbered", event.target.checked);
  });
  show();
}
