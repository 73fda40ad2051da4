"use strict";
// Draws the charts of a page from the JSON in #data. It makes no request, and writes texts only as text nodes.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const MARGIN = { left: 66, right: 14, top: 12, bottom: 42 };
  const TIP_LINES = 12;
  const kept = new URLSearchParams(location.hash.slice(1)); // settings that outlive a reload
  const hidden = new Set(); // looks of runs that are turned off
  let smoothing = page.smoothing, step = null, active = null;

  // ---- elements

  const add = (parent, name, attributes = {}, text = "") => {
    const isSvg = parent instanceof SVGElement || name === "svg";
    const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(text);
    parent.append(element);
    return element;
  };
  const look = (series) => `c${series.look % 8} d${Math.floor(series.look / 8) % 3}`;
  const swatch = (parent, series) => {
    const svg = add(parent, "svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
    add(svg, "path", { class: `curve ${look(series)}`, d: "M0 6H26" });
    if (series.dots) add(svg, "circle", { class: `dot ${look(series)}`, cx: 13, cy: 6, r: 4 });
  };

  // ---- numbers

  const short = (value) => {
    const size = Math.abs(value);
    if (size && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
    for (const [unit, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (size >= unit) return `${Number((value / unit).toPrecision(4))}${suffix}`;
    return `${Number(value.toPrecision(4))}`;
  };
  const FORMATS = {
    plain: (value) => value.toFixed(Math.abs(value) >= 100 ? 1 : 4),
    count: (value) => Math.round(value).toLocaleString("en"),
    share: (value) => `${(100 * value).toFixed(1)}%`,
    small: (value) => value.toExponential(2),
  };
  const tickText = (chart, value) => (chart.number === "share" ? `${Number((100 * value).toPrecision(4))}%` : short(value));
  const linearTicks = (low, high, most, whole = false) => {
    const size = 10 ** Math.floor(Math.log10((high - low) / most));
    const sizes = [1, 2, 5, 10].map((factor) => factor * size).filter((size) => !whole || size >= 1);
    const gap = sizes.find((gap) => (high - low) / gap <= most) ?? Math.max(1, 10 * size);
    const ticks = [];
    for (let n = Math.ceil(low / gap - 1e-9); n * gap <= high * (1 + 1e-12) + 1e-300; n++) ticks.push(Number((n * gap).toPrecision(12)));
    return ticks;
  };
  const logTicks = (low, high) => {
    for (const factors of [[1], [1, 3], [1, 2, 5]]) {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
        for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(3)));
      const inside = ticks.filter((tick) => tick >= low && tick <= high);
      if (inside.length >= 3) return inside;
    }
    return linearTicks(low, high, 5);
  };
  /** A mean in which each earlier value counts `weight` times as much as the next one, as in TensorBoard and W&B. */
  const smoothed = (values, weight) => {
    let sum = 0, norm = 0;
    return values.map((value) => {
      sum = weight * sum + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
      return sum / norm;
    });
  };
  const nearest = (steps, wanted) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    return low > 0 && wanted - steps[low - 1] <= steps[low] - wanted ? low - 1 : low;
  };

  // ---- one chart

  const steps = page.charts.flatMap((chart) => chart.series.flatMap((series) => [series.x[0], series.x.at(-1)]));
  const first = Math.min(...steps), last = Math.max(...steps, first + 1); // the same steps on all charts

  const visible = (chart) => chart.series.filter((series, i) => !hidden.has(series.look) && chart.boxes[i]?.checked !== false);
  const shown = (series) => (series.smooth && smoothing > 0 ? smoothed(series.y, smoothing) : series.y);

  const range = (chart) => {
    const values = visible(chart).flatMap((series) => (page.raw ? series.y.concat(shown(series)) : shown(series)));
    if (!values.length) return [0, 1];
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    chart.isLog = chart.logBox.checked && low > 0;
    if (high === low) high = low + Math.max(Math.abs(low) / 10, 1e-9);
    if (!chart.isLog && low > 0 && low <= high / 2) low = 0;
    const room = 0.04; // so that no curve lies on the frame
    if (chart.isLog) return [low / (high / low) ** room, high * (high / low) ** room];
    return [low === 0 ? 0 : low - room * (high - low), high + room * (high - low)];
  };

  const draw = (chart) => {
    const width = chart.plot.clientWidth, height = chart.plot.clientHeight;
    const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
    const [low, high] = range(chart);
    const up = (value) => (chart.isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
    chart.x = (value) => MARGIN.left + ((right - MARGIN.left) * (value - first)) / (last - first);
    chart.y = (value) => bottom - (bottom - MARGIN.top) * up(value);
    chart.stepAt = (x) => first + ((x - MARGIN.left) / (right - MARGIN.left)) * (last - first);
    const svg = chart.svg;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (const tick of chart.isLog ? logTicks(low, high) : linearTicks(low, high, 5)) {
      const y = chart.y(tick);
      add(svg, "path", { class: "grid", d: `M${MARGIN.left} ${y}H${right}` });
      add(svg, "text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, tickText(chart, tick));
    }
    for (const tick of linearTicks(first, last, Math.max(2, (right - MARGIN.left) / 80), true)) {
      const x = chart.x(tick);
      add(svg, "path", { class: "axis", d: `M${x} ${bottom}v4` });
      add(svg, "text", { x, y: bottom + 17, "text-anchor": "middle" }, tick.toLocaleString("en"));
    }
    add(svg, "path", { class: "axis", d: `M${MARGIN.left} ${bottom}H${right}` });
    add(svg, "text", { x: (MARGIN.left + right) / 2, y: height - 6, "text-anchor": "middle" }, "step");
    const middle = (MARGIN.top + bottom) / 2;
    const axis = `${chart.axis}${chart.isLog ? ", log scale" : ""}`;
    add(svg, "text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, axis);
    for (const series of visible(chart)) drawSeries(chart, series);
    chart.overlay = add(svg, "g");
    showStep(chart);
  };

  const drawSeries = (chart, series) => {
    const values = shown(series);
    const path = (ys) => ys.map((y, i) => `${i ? "L" : "M"}${chart.x(series.x[i]).toFixed(1)} ${chart.y(y).toFixed(1)}`).join("");
    if (values !== series.y && page.raw) add(chart.svg, "path", { class: `curve raw ${look(series)}`, d: path(series.y) });
    add(chart.svg, "path", { class: `curve ${look(series)}`, d: path(values) });
    if (series.dots || values.length === 1)
      values.forEach((y, i) => add(chart.svg, "circle", { class: `dot ${look(series)}`, cx: chart.x(series.x[i]), cy: chart.y(y), r: values.length > 60 ? 2 : 3.5 }));
  };

  // ---- values at the pointer

  const valueText = (chart, series, i) => {
    const format = FORMATS[chart.number], values = shown(series);
    const raw = values !== series.y && page.raw ? ` (${format(series.y[i])})` : "";
    return `${format(values[i])}${raw}${series.x[i] === step ? "" : ` at ${series.x[i].toLocaleString("en")}`}`;
  };

  const showStep = (chart) => {
    chart.overlay.replaceChildren();
    chart.tip.hidden = true;
    if (step === null) return;
    const x = chart.x(step);
    add(chart.overlay, "path", { class: "cursor", d: `M${x} ${MARGIN.top}V${chart.plot.clientHeight - MARGIN.bottom}` });
    const found = visible(chart).map((series) => ({ series, i: nearest(series.x, step) }));
    for (const { series, i } of found)
      add(chart.overlay, "circle", { class: `dot ${look(series)}`, cx: chart.x(series.x[i]), cy: chart.y(shown(series)[i]), r: 4 });
    if (found.length > 3) found.sort((a, b) => shown(b.series)[b.i] - shown(a.series)[a.i]);
    const texts = found.map(({ series, i }) => `${series.name} ${valueText(chart, series, i)}`);
    chart.plot.setAttribute("aria-valuenow", step);
    chart.plot.setAttribute("aria-valuetext", `step ${step}: ${texts.join(", ")}`);
    if (chart !== active && found.length > 3) return; // many values are shown on the chart under the pointer alone
    chart.tip.replaceChildren();
    add(chart.tip, "strong", {}, `step ${step.toLocaleString("en")}`);
    found.slice(0, TIP_LINES).forEach(({ series }, n) => {
      const line = add(chart.tip, "div");
      swatch(line, series);
      add(line, "span", {}, texts[n]);
    });
    if (found.length > TIP_LINES) add(chart.tip, "div", {}, `and ${found.length - TIP_LINES} more below`);
    chart.tip.hidden = false;
    const width = chart.plot.clientWidth, own = chart.tip.offsetWidth;
    const left = x > width / 2 ? x - own - 10 : x + 10;
    chart.tip.style.left = `${Math.min(Math.max(0, left), width - own)}px`;
  };

  const goTo = (chart, wanted) => {
    const series = [...visible(chart)].sort((a, b) => b.x.length - a.x.length)[0];
    active = chart;
    step = wanted === null || !series ? null : series.x[nearest(series.x, wanted)];
    page.charts.forEach(showStep);
  };

  const move = (chart, event) => {
    const series = [...visible(chart)].sort((a, b) => b.x.length - a.x.length)[0];
    if (!series) return;
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
    const at = step === null ? series.x.length - 1 : nearest(series.x, step);
    const to = { Home: 0, End: series.x.length - 1 }[event.key] ?? (by && at + by);
    if (event.key === "Escape") goTo(chart, null);
    else if (to !== undefined) goTo(chart, series.x[Math.min(Math.max(to, 0), series.x.length - 1)]);
    else return;
    event.preventDefault();
  };

  /** The legend of one chart. With several curves, each has a box that turns it off. */
  const writeLegend = (chart, legend, number) => {
    for (const [i, series] of chart.series.entries()) {
      let item = add(legend, "li");
      if (chart.series.length > 1) {
        item = add(item, "label");
        const box = { type: "checkbox", name: `show${number}-${i}`, checked: "", "aria-label": `${chart.title}: show ${series.name}` };
        chart.boxes.push(add(item, "input", box));
      }
      swatch(item, series);
      item.append(series.name);
    }
  };

  const setUp = (chart, number) => {
    const panel = document.querySelector(`[data-chart="${number}"]`);
    chart.boxes = [];
    chart.plot = panel.querySelector(".plot");
    chart.logBox = panel.querySelector("input");
    chart.svg = add(chart.plot, "svg", { "aria-hidden": "true" });
    chart.tip = add(chart.plot, "div", { class: "tip" });
    const slider = { role: "slider", tabindex: 0, "aria-label": `${chart.title} by step`, "aria-valuemin": first, "aria-valuemax": last };
    const values = { "aria-valuenow": last, "aria-valuetext": `step ${last}` };
    for (const [key, value] of Object.entries({ ...slider, ...values })) chart.plot.setAttribute(key, value);
    const legend = panel.querySelector(".legend");
    if (page.shared) legend.remove(); // one legend for all charts, at the top of the page
    else writeLegend(chart, legend, number);
    const point = (event) => goTo(chart, chart.stepAt(event.clientX - chart.plot.getBoundingClientRect().left));
    chart.plot.addEventListener("pointermove", point);
    chart.plot.addEventListener("pointerdown", point);
    chart.plot.addEventListener("pointerleave", () => goTo(chart, null));
    chart.plot.addEventListener("focus", () => goTo(chart, step ?? last));
    chart.plot.addEventListener("blur", () => goTo(chart, null));
    chart.plot.addEventListener("keydown", (event) => move(chart, event));
    new ResizeObserver(() => draw(chart)).observe(chart.plot);
  };

  // ---- settings of the page

  const apply = () => {
    const slider = document.querySelector("input[name=smoothing]");
    smoothing = Number(slider.value);
    slider.nextElementSibling.value = smoothing.toFixed(2);
    hidden.clear();
    for (const box of document.querySelectorAll("input[data-look]")) if (!box.checked) hidden.add(Number(box.dataset.look));
    page.charts.forEach(draw);
  };
  page.charts.forEach(setUp);
  for (const input of document.querySelectorAll("input[name]")) {
    const isBox = input.type === "checkbox", stored = kept.get(input.name);
    if (stored !== null) isBox ? (input.checked = stored === "1") : (input.value = stored);
    input.addEventListener("input", () => {
      kept.set(input.name, isBox ? Number(input.checked) : input.value);
      history.replaceState(null, "", `#${kept}`);
      apply();
    });
  }
  for (const place of document.querySelectorAll("[data-swatch]")) swatch(place, { look: Number(place.dataset.swatch) });
  apply();

  const refresh = document.querySelector("input[name=refresh]");
  if (refresh) {
    setInterval(() => refresh.checked && !document.hidden && step === null && location.reload(), 1000 * page.refresh_s);
    const silent_min = Math.floor((Date.now() / 1000 - page.written) / 60);
    const note = document.getElementById("silent");
    if (silent_min >= 10) note.append(`This page was written ${silent_min} minutes ago, and nothing has rewritten it since. ${page.silence}`);
    note.hidden = silent_min < 10;
  }
})();
