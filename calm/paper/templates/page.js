"use strict";
// Re-colours the outputs of a panel when its measure or threshold changes.
for (const panel of document.querySelectorAll("[data-panel]")) {
  const data = JSON.parse(panel.querySelector("script.data").textContent);
  const find = (name) => panel.querySelector("." + name);
  const slider = find("slider"), measure = find("measure");
  const number = (value, digits) => value === null ? "–" : value.toFixed(digits);

  function show() {
    const chosen = data.measures[measure.value], at = Number(slider.value);
    const threshold = String(+chosen.thresholds[at].toPrecision(4));
    find("threshold").textContent = threshold;
    slider.setAttribute("aria-valuetext", threshold);
    let layers = 0, tokens = 0;
    panel.querySelectorAll(".example").forEach((example, i) => {
      const level = chosen.items[i][at];
      const spans = level.p.map((piece, t) => {
        const span = document.createElement("span");
        span.className = "k k" + level.l[t];
        span.dataset.l = level.l[t];
        span.title = "layer " + level.l[t] + ", confidence " + number(level.c[t], 2);
        span.textContent = piece;
        layers += level.l[t];
        tokens += 1;
        return span;
      });
      example.querySelector(".tokens").replaceChildren(...spans);
      example.querySelector(".d").textContent = number(level.d, 2);
      example.querySelector(".r").textContent = number(level.r, 2);
      example.querySelector(".m").textContent = number(level.m, 2);
    });
    find("overall").textContent = tokens ? number(layers / tokens, 2) + " layers a token" : "–";
  }

  measure.addEventListener("change", () => {
    const chosen = data.measures[measure.value];
    slider.max = chosen.thresholds.length - 1;
    slider.value = chosen.chosen;
    const mark = find("mark");
    mark.hidden = !chosen.certified.startsWith("certified");
    mark.style.setProperty("--at", chosen.chosen / Math.max(1, chosen.thresholds.length - 1));
    find("promise").textContent = chosen.certified;
    show();
  });
  slider.addEventListener("input", show);
  find("numbers").addEventListener("change", (event) => {
    panel.classList.toggle("numbered", event.target.checked);
  });
  show();
}
