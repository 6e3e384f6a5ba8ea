"use strict";
// Charts by uPlot, in the colours of the style sheet, drawn anew when these change.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function compact(value) {
  if (value === null || value === undefined) return "–";
  const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  for (const [scale, unit] of units) if (Math.abs(value) >= scale) return `${Number((value / scale).toPrecision(3))} ${unit}`;
  return `${Number(value.toPrecision(3))}`;
}

// One chart of rounds. Its series are lines or bars: {label, colour, bars, dashed, points, said}. `min` is where the
// axis begins unless values lie below, `log` makes it logarithmic; `right` gives the factor of a second axis, or null.
class Chart {
  constructor(id, { series, min, log = false, whole = false, format = compact, right = () => null }) {
    Object.assign(this, { place: document.getElementById(id), series, min, log, whole, format, right });
    new ResizeObserver(() => this.resize()).observe(this.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
  }

  show(data) {
    this.data = data;
    if (this.plot && this.factor === this.right()) this.plot.setData(data);
    else this.rebuild();
  }

  resize() {
    if (this.plot && this.place.clientWidth) this.plot.setSize(this.size());
    else this.rebuild();
  }

  size() {
    return { width: this.place.clientWidth, height: this.place.clientHeight };
  }

  rebuild() {
    if (!this.data || !this.place.clientWidth) return;
    if (this.plot) this.plot.destroy();
    this.factor = this.right();
    this.plot = new uPlot({
      ...this.size(),
      padding: [8, this.factor === null ? 12 : 0, 0, 0],
      axes: this.axes(),
      scales: this.scales(),
      series: [{}, ...this.series.map((series) => this.style(series))],
      cursor: { drag: { x: false, y: false }, points: { size: 7 } },
      legend: { show: false },
      plugins: [this.tip()],
    }, this.data, this.place);
  }

  axes() {
    const axis = { stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const steps = [1, 2, 5].flatMap((step) => [1, 10, 100, 1e3, 1e4, 1e5, 1e6].map((scale) => step * scale)).sort((left, right) => left - right);
    const values = (_, ticks) => ticks.map((tick) => (tick === null ? null : this.format(tick)));
    const axes = [
      { ...axis, size: 26, space: 50, incrs: steps },
      { ...axis, size: 56, space: 36, values, ...(this.whole ? { incrs: steps } : {}) },
    ];
    if (this.factor !== null) axes.push({ ...axis, scale: "right", side: 1, size: 44, space: 36, grid: { show: false } });
    return axes;
  }

  scales() {
    const edge = this.series.some((series) => series.bars) ? 0.6 : 0;
    const rounds = (_, low, high) => (low === high ? [low - 1, high + 1] : [low - edge, high + edge]);
    const scales = { x: { time: false, range: rounds }, y: { range: (_, low, high) => this.range(low, high), distr: this.log ? 3 : 1 } };
    if (this.factor !== null) scales.right = { from: "y", range: (_, low, high) => [low * this.factor, high * this.factor] };
    return scales;
  }

  style(series) {
    const stroke = colour(series.colour);
    if (series.bars) return { label: series.label, stroke, fill: stroke, width: 0, paths: uPlot.paths.bars({ size: [0.8, 24] }), points: { show: false } };
    return { label: series.label, stroke, width: 2, dash: series.dashed ? [6, 5] : undefined, spanGaps: true, points: { show: series.points ? undefined : false, size: 5, fill: stroke } };
  }

  range(low, high) {
    if (low === null || high === null) return this.log ? [1, 10] : [0, 1];
    if (this.log) return uPlot.rangeLog(low, high, 10, true);
    const bottom = this.min === undefined ? low : Math.min(this.min, low);
    const slack = (high - bottom || Math.abs(high) || 1) * 0.06;
    return [this.min === undefined ? bottom - slack : bottom, high + slack];
  }

  // What lies under the pointer, in words.
  tip() {
    const box = document.createElement("div");
    box.className = "tip";
    box.hidden = true;
    return {
      hooks: {
        init: (plot) => plot.over.append(box),
        setCursor: (plot) => {
          const index = plot.cursor.idx;
          box.hidden = index === null || index === undefined || plot.cursor.left < 0;
          if (box.hidden) return;
          const lines = this.series.map((series, place) => [series, plot.data[place + 1][index]]).filter(([, value]) => value !== null && value !== undefined);
          const said = lines.map(([series, value]) => `${series.label} ${(series.said || this.format)(value, index)}`);
          box.textContent = [`round ${plot.data[0][index]}`, ...said].join("\n");
          const right = plot.cursor.left > plot.over.clientWidth / 2;
          box.style.left = right ? "" : `${plot.cursor.left + 12}px`;
          box.style.right = right ? `${plot.over.clientWidth - plot.cursor.left + 12}px` : "";
          box.style.top = "4px";
        },
      },
    };
  }
}
