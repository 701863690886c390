// A figure for a reader with a mouse: hover tells what is under the pointer, a click enlarges one axes, a box zooms in.
// Written by hand, without a library; nothing is fetched. It gets the picture and plain data (aprlab/figures/live.py) and
// draws on a canvas. All words go into the page as text. Used by aprlab's extension of JupyterLab and in exported pages.
(function () {
  "use strict";

  const NEAR = 24; // pixels from the pointer within which a point of a line is read
  const INK = "#222", FAINT = "#777", GRID = "#e4e4e4";

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      name.startsWith("on") ? made.addEventListener(name.slice(2), value) : made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  function raw(text) {
    const letters = atob(text);
    const bytes = new Uint8Array(letters.length);
    for (let n = 0; n < letters.length; n++) {
      bytes[n] = letters.charCodeAt(n);
    }
    return bytes;
  }

  const numbers = (text) => new Float32Array(raw(text).buffer);
  const colour = (text) => (/^#[0-9a-f]{6}$/i.test(text) ? text : "rgba(0,0,0,0)");

  // Four digits, as the data has them.
  function said(value) {
    if (!Number.isFinite(value)) {
      return Number.isNaN(value) ? "NaN" : value > 0 ? "Inf" : "-Inf";
    }
    const size = Math.abs(value);
    return size === 0 ? "0" : size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  // ── one axis: data -> place between 0 and 1 of [low, high], and back ──────────────────────────────────────────────

  function bent(axis) {
    if (axis.scale === "log") {
      return [(v) => Math.log10(v), (u) => 10 ** u];
    }
    if (axis.scale === "symlog") {
      const edge = axis.linear, room = 1 / 0.9;
      return [
        (v) => (Math.abs(v) <= edge ? (v / edge) * room : Math.sign(v) * (room + Math.log10(Math.abs(v) / edge))),
        (u) => (Math.abs(u) <= room ? (u / room) * edge : Math.sign(u) * edge * 10 ** (Math.abs(u) - room)),
      ];
    }
    return [(v) => v, (u) => u];
  }

  class Axis {
    constructor(given) {
      Object.assign(this, given);
      [this.to, this.from] = bent(given);
      this.whole = given.ends.map(this.to); // in bent units
      this.shown = [...this.whole];
    }

    part(value) {
      return (this.to(value) - this.shown[0]) / (this.shown[1] - this.shown[0]);
    }

    value(part) {
      return this.from(this.shown[0] + part * (this.shown[1] - this.shown[0]));
    }

    // Where labels go: those of the figure where it names places, round numbers elsewhere.
    marks(most) {
      if (this.ticks) {
        const inside = this.ticks.filter(([at]) => this.part(at) >= -1e-9 && this.part(at) <= 1 + 1e-9);
        const step = Math.ceil(inside.length / most);
        if (inside.length > 1 || this.shown.every((end, n) => end === this.whole[n])) {
          return inside.filter((_, n) => n % step === 0);
        }
      }
      const [low, high] = [Math.min(...this.shown), Math.max(...this.shown)];
      const decade = this.scale !== "linear" && high - low > 1.5;
      let step = decade ? Math.max(1, Math.ceil((high - low) / most)) : 0;
      if (decade) {
        const marks = [];
        for (let u = Math.ceil(low / step) * step; u <= high + 1e-9; u += step) {
          const value = this.scale === "log" ? 10 ** u : this.from(u);
          marks.push([value, said(Number(value.toPrecision(2)))]);
        }
        return marks;
      }
      const ends = [this.from(low), this.from(high)];
      step = 10 ** Math.floor(Math.log10((ends[1] - ends[0]) / most || 1));
      step *= [1, 2, 5, 10].find((times) => (ends[1] - ends[0]) / (step * times) <= most) || 10;
      const marks = [];
      for (let n = Math.ceil(ends[0] / step); n * step <= ends[1] + step * 1e-6; n++) {
        marks.push([n * step, said(Number((n * step).toPrecision(8)))]);
      }
      return marks;
    }

    // What a place is called: the word that the figure has there, else its number.
    name(value, places) {
      const whole = Math.round(value);
      const tick = this.ticks && this.ticks.find(([at]) => Math.abs(at - whole) < 1e-6);
      const word = places.length ? places[whole] : tick && tick[1];
      const text = word === undefined ? String(whole) : word;
      return /^-?\d+$/.test(text) && this.label ? `${this.label} ${text}` : text;
    }
  }

  // ── one axes ────────────────────────────────────────────────────────────────────────────────────────────────────────

  function opened(given) {
    const points = (some) => ({ ...some, x: numbers(some.x), y: numbers(some.y) });
    return {
      ...given,
      x: new Axis(given.x), y: new Axis(given.y),
      lines: given.lines.map(points), points: given.points.map(points), bands: given.bands.map(points),
      bars: given.bars.map((bar) => ({ ...bar, corners: [...numbers(bar.corners)] })),
      maps: given.maps.map((map) => ({ ...map, values: numbers(map.values), places: raw(map.places) })),
    };
  }

  // The cell of a map at a place in data units.
  function cell(map, x, y) {
    const [left, right, bottom, top] = map.extent;
    const column = Math.floor(((x - left) / (right - left)) * map.columns);
    const row = Math.floor(((y - top) / (bottom - top)) * map.rows);
    return column >= 0 && column < map.columns && row >= 0 && row < map.rows ? [row, column] : null;
  }

  // What is at a place (parts of the axes, from the lower left), and where the mark goes: {text, part} or null.
  function read(axes, across, up, width, height) {
    const x = axes.x.value(across), y = axes.y.value(up);
    for (const map of axes.maps) {
      const at = cell(map, x, y);
      if (at) {
        const [left, right, bottom, top] = map.extent;
        const middle = [left + ((at[1] + 0.5) / map.columns) * (right - left), top + ((at[0] + 0.5) / map.rows) * (bottom - top)];
        const value = map.values[at[0] * map.columns + at[1]];
        const state = axes.states && axes.states[value];
        const word = axes.words.find(([wx, wy]) => Math.abs(wx - middle[0]) < 0.5 && Math.abs(wy - middle[1]) < 0.5);
        const names = [axes.y.name(middle[1], axes.places), axes.x.name(middle[0], axes.places)];
        const place = (axes.whole || []).includes(at[0]) ? names[0] : names.join(" · ");
        const shown = state !== undefined ? state : word ? `${word[2].replace(/\n/g, " ")} (${said(value)})` : said(value);
        return { text: `${place}: ${shown}`, part: [axes.x.part(middle[0]), axes.y.part(middle[1])] };
      }
    }
    let best = null, least = NEAR;
    const near = (px, py, text) => {
      const part = [axes.x.part(px), axes.y.part(py)];
      const far = Math.hypot((part[0] - across) * width, (part[1] - up) * height);
      if (far < least) {
        [best, least] = [{ text: text(), part }, far];
      }
    };
    const pair = (px, py) => {
      const named = (axis, value) => {
        const tick = axis.ticks && axis.ticks.find(([at]) => Math.abs(at - value) < 1e-6);
        return tick && tick[1] ? tick[1] : `${axis.label ? `${axis.label} ` : ""}${said(value)}`;
      };
      return `${named(axes.x, px)}, ${named(axes.y, py)}`;
    };
    for (const line of axes.lines) {
      if (line.label || line.dots) {
        line.x.forEach((px, n) => near(px, line.y[n], () => `${line.label ? `${line.label}: ` : ""}${pair(px, line.y[n])}`));
      }
    }
    for (const some of axes.points) {
      some.x.forEach((px, n) => near(px, some.y[n], () => `${some.label ? `${some.label}: ` : ""}${pair(px, some.y[n])}`));
    }
    if (best) {
      return best;
    }
    for (const bar of axes.bars) {
      const [x0, y0, x1, y1] = bar.corners;
      if (bar.filled && x >= Math.min(x0, x1) && x <= Math.max(x0, x1) && y >= Math.min(y0, y1) && y <= Math.max(y0, y1)) {
        const lying = axes.y.ticks && !axes.x.ticks;
        const place = lying ? axes.y.name((y0 + y1) / 2, []) : axes.x.name((x0 + x1) / 2, []);
        const long = lying ? (x0 === 0 ? said(x1) : `${said(x0)} to ${said(x1)}`) : y0 === 0 ? said(y1) : `${said(y0)} to ${said(y1)}`;
        return { text: `${place}${bar.label ? `, ${bar.label}` : ""}: ${long}`, part: [across, up] };
      }
    }
    return null;
  }

  // ── drawing one axes on a canvas ────────────────────────────────────────────────────────────────────────────────────

  const FRAME = { left: 84, top: 30, bottom: 76 };
  const scaled = (axes) => axes.maps.find((map) => map.bar);
  const right = (axes) => (scaled(axes) ? 106 : 16); // room for the colour bar

  function draw(axes, canvas, width, height) {
    const sharp = window.devicePixelRatio || 1;
    canvas.width = width * sharp;
    canvas.height = height * sharp;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, width, height);
    const box = { x: FRAME.left, y: FRAME.top, w: width - FRAME.left - right(axes), h: height - FRAME.top - FRAME.bottom };
    const at = (x, y) => [box.x + axes.x.part(x) * box.w, box.y + (1 - axes.y.part(y)) * box.h];
    pen.font = "12px system-ui, sans-serif";
    marks(axes, pen, box);
    pen.save();
    pen.beginPath();
    pen.rect(box.x, box.y, box.w, box.h);
    pen.clip();
    axes.maps.forEach((map) => drawMap(map, pen, at));
    axes.bands.forEach((band) => drawBand(band, pen, at));
    axes.bars.forEach((bar) => drawBar(bar, pen, at));
    axes.lines.forEach((line) => drawLine(line, pen, at));
    axes.points.forEach((some) => drawPoints(some, pen, at));
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (const [x, y, text, ink] of axes.words) {
      pen.fillStyle = colour(ink);
      text.split("\n").forEach((line, n, all) => pen.fillText(line, at(x, y)[0], at(x, y)[1] + 14 * (n - (all.length - 1) / 2)));
    }
    pen.restore();
    pen.strokeStyle = FAINT;
    pen.strokeRect(box.x, box.y, box.w, box.h);
    if (scaled(axes)) {
      drawScale(scaled(axes), pen, box);
    }
    return box;
  }

  // The colour bar of a map, as high as the axes: low at the bottom, a value at each mark.
  function drawScale(map, pen, box) {
    const x = box.x + box.w + 14, wide = 14, step = box.h / map.table.length;
    map.table.forEach((ink, n) => {
      pen.fillStyle = colour(ink);
      pen.fillRect(x, box.y + box.h - (n + 1) * step, wide, step + 0.5);
    });
    pen.strokeRect(x, box.y, wide, box.h);
    pen.fillStyle = INK;
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    for (const [part, value] of map.bar.marks) {
      pen.fillText(said(value).replace(".00e", "e"), x + wide + 5, box.y + (1 - part) * box.h);
    }
    pen.save();
    pen.translate(x + 82, box.y + box.h / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(map.bar.label.replace(/\n/g, " · "), 0, 0);
    pen.restore();
  }

  function marks(axes, pen, box) {
    pen.fillStyle = INK;
    pen.strokeStyle = GRID;
    pen.textBaseline = "top";
    pen.textAlign = "center";
    const across = axes.x.marks(Math.max(2, Math.floor(box.w / 60)));
    const slanted = across.some(([, text]) => pen.measureText(text).width > box.w / across.length - 6);
    for (const [value, text] of across) {
      const x = box.x + axes.x.part(value) * box.w;
      pen.beginPath();
      pen.moveTo(x, box.y);
      pen.lineTo(x, box.y + box.h);
      pen.stroke();
      pen.save();
      pen.translate(x, box.y + box.h + 6);
      if (slanted) {
        pen.textAlign = "right";
        pen.rotate(-0.8);
      }
      pen.fillText(text.slice(0, 22), 0, 0);
      pen.restore();
    }
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const [value, text] of axes.y.marks(Math.max(2, Math.floor(box.h / 18)))) {
      const y = box.y + (1 - axes.y.part(value)) * box.h;
      pen.beginPath();
      pen.moveTo(box.x, y);
      pen.lineTo(box.x + box.w, y);
      pen.stroke();
      pen.fillText(text.slice(0, 14), box.x - 6, y);
    }
    pen.textAlign = "center";
    pen.fillText(axes.x.label, box.x + box.w / 2, box.y + box.h + FRAME.bottom - 10);
    pen.save();
    pen.translate(12, box.y + box.h / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(axes.y.label.replace(/\n/g, " "), 0, 0);
    pen.restore();
    pen.textAlign = "left";
    pen.font = "bold 13px system-ui, sans-serif";
    pen.fillText(axes.title, box.x, 14);
    pen.font = "12px system-ui, sans-serif";
  }

  function drawMap(map, pen, at) {
    const [left, right, bottom, top] = map.extent;
    pen.globalAlpha = map.alpha;
    for (let row = 0; row < map.rows; row++) {
      for (let column = 0; column < map.columns; column++) {
        const place = map.places[row * map.columns + column];
        pen.fillStyle = place === 255 ? colour(map.nothing) : colour(map.table[Math.min(place, 63)]);
        const a = at(left + (column / map.columns) * (right - left), top + (row / map.rows) * (bottom - top));
        const b = at(left + ((column + 1) / map.columns) * (right - left), top + ((row + 1) / map.rows) * (bottom - top));
        const [x, y] = [Math.floor(Math.min(a[0], b[0])), Math.floor(Math.min(a[1], b[1]))];
        pen.fillRect(x, y, Math.ceil(Math.max(a[0], b[0])) - x, Math.ceil(Math.max(a[1], b[1])) - y);
      }
    }
    pen.globalAlpha = 1;
  }

  function drawBand(band, pen, at) {
    pen.globalAlpha = band.alpha;
    pen.fillStyle = colour(band.colour);
    pen.beginPath();
    band.x.forEach((x, n) => pen.lineTo(...at(x, band.y[n])));
    pen.fill();
    pen.globalAlpha = 1;
  }

  function drawBar(bar, pen, at) {
    const [x0, y0, x1, y1] = bar.corners;
    const a = at(x0, y0), b = at(x1, y1);
    const sides = [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.abs(b[0] - a[0]), Math.abs(b[1] - a[1])];
    pen.globalAlpha = bar.alpha;
    pen.fillStyle = pen.strokeStyle = colour(bar.colour);
    pen.lineWidth = 2;
    bar.filled ? pen.fillRect(...sides) : pen.strokeRect(...sides);
    pen.lineWidth = 1;
    pen.globalAlpha = 1;
  }

  function drawLine(line, pen, at) {
    pen.strokeStyle = pen.fillStyle = colour(line.colour);
    pen.lineWidth = Math.max(line.width, 0.5);
    pen.setLineDash(line.dashed ? [5, 4] : []);
    if (line.width) {
      pen.beginPath();
      let down = false;
      line.x.forEach((x, n) => {
        const place = at(x, line.y[n]);
        if (place.every(Number.isFinite)) {
          down ? pen.lineTo(...place) : pen.moveTo(...place);
        }
        down = place.every(Number.isFinite);
      });
      pen.stroke();
    }
    pen.setLineDash([]);
    pen.lineWidth = 1;
    if (line.dots) {
      line.x.forEach((x, n) => dot(pen, at(x, line.y[n]), 3));
    }
  }

  function drawPoints(some, pen, at) {
    pen.fillStyle = colour(some.colour);
    pen.globalAlpha = 0.6;
    some.x.forEach((x, n) => dot(pen, at(x, some.y[n]), Math.max(2, some.radius)));
    pen.globalAlpha = 1;
  }

  function dot(pen, place, radius) {
    if (place.every(Number.isFinite)) {
      pen.beginPath();
      pen.arc(...place, radius, 0, 7);
      pen.fill();
    }
  }

  // ── the figure ──────────────────────────────────────────────────────────────────────────────────────────────────────

  const STYLE =
    "position:absolute;pointer-events:none;background:#222;color:#fff;padding:2px 7px;border-radius:3px;font:12px system-ui,sans-serif;" +
    "white-space:nowrap;z-index:2;display:none";
  const HELP = "hover: values · click: enlarge";
  const HELP_LARGE = "drag: zoom in · double-click: all · + − arrows: zoom and move · Esc: back";

  class LiveFigure {
    constructor(host, picture, data) {
      this.axes = data.axes.map(opened);
      this.large = null;
      this.host = host;
      this.picture = picture;
      this.tip = element("div", { style: STYLE, "aria-hidden": "true" });
      this.mark = element("div", { style: "position:absolute;pointer-events:none;border:1px solid #222;outline:1px solid #fff;display:none" });
      this.canvas = element("canvas", { style: "display:none;touch-action:none" });
      this.help = element("span", {}, HELP);
      this.back = element("button", { type: "button", style: "display:none", onclick: () => this.leave() }, "whole figure");
      this.legend = element("span", {});
      const below = element(
        "div", { style: `font:12px system-ui,sans-serif;color:${FAINT};display:flex;flex-wrap:wrap;gap:10px;min-height:1.6em`, class: "aprlab-live-help" },
        this.back, this.legend, this.help
      );
      this.frame = element("div", { style: "position:relative;display:inline-block;max-width:100%", tabindex: "0", role: "group" });
      this.frame.setAttribute("aria-label", `${picture.alt} Press Enter to enlarge an axes.`);
      this.status = element("div", { role: "status", style: "position:absolute;left:-9999px" });
      this.frame.append(picture, this.canvas, this.mark, this.tip, this.status);
      host.replaceChildren(this.frame, below);
      host.classList.add("aprlab-live");
      const listen = (name, action) => this.frame.addEventListener(name, action);
      listen("pointermove", (event) => this.moved(event));
      listen("pointerleave", () => this.quiet());
      listen("pointerdown", (event) => this.pressed(event));
      listen("pointerup", (event) => this.released(event));
      listen("dblclick", () => this.large && this.all());
      listen("wheel", (event) => this.wheel(event));
      listen("keydown", (event) => this.key(event));
    }

    // The axes under the pointer, and where in it: parts from the lower left, and its size in pixels.
    under(event) {
      const frame = this.frame.getBoundingClientRect();
      const x = event.clientX - frame.left, y = event.clientY - frame.top;
      if (this.large) {
        const box = this.box;
        return { axes: this.large, across: (x - box.x) / box.w, up: 1 - (y - box.y) / box.h, left: box.x, top: box.y, w: box.w, h: box.h };
      }
      const size = this.picture.getBoundingClientRect();
      for (const axes of this.axes) {
        const [left, top, right, bottom] = axes.box.map((part, n) => part * (n % 2 ? size.height : size.width));
        if (x >= left && x <= right && y >= top && y <= bottom) {
          const [w, h] = [right - left, bottom - top];
          return { axes, across: (x - left) / w, up: 1 - (y - top) / h, left, top, w, h };
        }
      }
      return null;
    }

    moved(event) {
      const at = this.under(event);
      if (this.start) {
        this.stretch(at);
        return;
      }
      const found = at && at.across >= 0 && at.across <= 1 && at.up >= 0 && at.up <= 1 && read(at.axes, at.across, at.up, at.w, at.h);
      if (!found) {
        this.quiet();
        return;
      }
      this.tip.textContent = found.text;
      const x = at.left + found.part[0] * at.w, y = at.top + (1 - found.part[1]) * at.h;
      this.tip.style.display = this.mark.style.display = "block";
      const room = this.frame.clientWidth - this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, Math.min(room, x + 10))}px`;
      this.tip.style.top = `${y > 34 ? y - 32 : y + 12}px`;
      Object.assign(this.mark.style, { left: `${x - 3}px`, top: `${y - 3}px`, width: "5px", height: "5px" });
    }

    quiet() {
      this.tip.style.display = this.mark.style.display = "none";
    }

    pressed(event) {
      if (event.target.closest("button") || event.button) {
        return;
      }
      const at = this.under(event);
      if (at && this.large) {
        this.start = at;
        this.frame.setPointerCapture(event.pointerId);
        event.preventDefault();
        this.frame.focus();
      }
    }

    stretch(at) {
      const left = Math.min(at.across, this.start.across), right = Math.max(at.across, this.start.across);
      const top = 1 - Math.max(at.up, this.start.up), bottom = 1 - Math.min(at.up, this.start.up);
      this.tip.style.display = "none";
      Object.assign(this.mark.style, {
        display: "block", left: `${at.left + left * at.w}px`, top: `${at.top + top * at.h}px`,
        width: `${(right - left) * at.w}px`, height: `${(bottom - top) * at.h}px`,
      });
    }

    released(event) {
      const at = this.under(event), start = this.start;
      this.start = null;
      if (!this.large) {
        if (at && event.button === 0) {
          this.enlarge(at.axes);
        }
      } else if (at && start && Math.abs(at.across - start.across) * at.w > 6 && Math.abs(at.up - start.up) * at.h > 6) {
        this.zoom([at.across, start.across], [at.up, start.up]);
      }
      this.quiet();
    }

    wheel(event) {
      const at = this.large && this.under(event);
      if (at && at.across >= 0 && at.across <= 1 && at.up >= 0 && at.up <= 1) {
        event.preventDefault();
        this.around(at.across, at.up, event.deltaY < 0 ? 0.8 : 1.25);
      }
    }

    around(across, up, times) {
      this.zoom([across - across * times, across + (1 - across) * times], [up - up * times, up + (1 - up) * times]);
    }

    // Parts of what is shown now become the whole; never beyond what the figure has.
    zoom(across, up) {
      for (const [axis, parts] of [[this.large.x, across], [this.large.y, up]]) {
        const [low, high] = axis.shown, size = high - low;
        let next = [low + Math.min(...parts) * size, low + Math.max(...parts) * size];
        const [first, last] = axis.whole, down = last < first;
        const inside = (value) => Math.min(Math.max(value, Math.min(first, last)), Math.max(first, last));
        next = next.map(inside);
        if (Math.abs(next[1] - next[0]) > Math.abs(last - first) * 1e-4 && down === next[1] < next[0]) {
          axis.shown = next;
        }
      }
      this.redraw();
    }

    all() {
      this.large.x.shown = [...this.large.x.whole];
      this.large.y.shown = [...this.large.y.whole];
      this.redraw();
    }

    enlarge(axes) {
      const size = this.picture.getBoundingClientRect();
      const wide = Math.max(size.width, Math.min(560, this.host.clientWidth || 560)), high = Math.min(560, Math.max(380, size.height));
      const square = high - FRAME.top - FRAME.bottom + FRAME.left + right(axes);
      this.size = [axes.square ? Math.min(wide, square) : wide, high];
      this.large = axes;
      this.picture.style.display = "none";
      this.canvas.style.display = "block";
      this.back.style.display = "";
      this.help.textContent = HELP_LARGE;
      this.legend.replaceChildren(...legend(axes));
      this.all();
      this.tell(`enlarged: ${axes.title || axes.y.label}`);
      this.frame.focus();
    }

    leave() {
      if (this.large) {
        this.all();
        this.large = null;
        this.picture.style.display = "";
        this.canvas.style.display = this.back.style.display = "none";
        this.help.textContent = HELP;
        this.legend.replaceChildren();
        this.quiet();
        this.frame.focus();
      }
    }

    redraw() {
      this.box = draw(this.large, this.canvas, ...this.size);
    }

    // Arrows in the whole figure go from axes to axes.
    point(turn) {
      this.turn = turn;
      const size = this.picture.getBoundingClientRect(), axes = this.axes[turn];
      const [left, top, right, bottom] = axes.box.map((part, n) => part * (n % 2 ? size.height : size.width));
      Object.assign(this.mark.style, {
        display: "block", left: `${left}px`, top: `${top}px`, width: `${right - left}px`, height: `${bottom - top}px`,
      });
      this.tell(`${turn + 1} of ${this.axes.length}: ${axes.title || axes.y.label}`);
    }

    shift(across, up) {
      for (const [axis, part] of [[this.large.x, across], [this.large.y, up]]) {
        const by = part * (axis.shown[1] - axis.shown[0]), [low, high] = [Math.min(...axis.whole), Math.max(...axis.whole)];
        const next = axis.shown.map((end) => end + by);
        if (Math.min(...next) >= low - 1e-9 && Math.max(...next) <= high + 1e-9) {
          axis.shown = next;
        }
      }
      this.redraw();
    }

    tell(words) {
      this.status.textContent = words;
    }

    key(event) {
      if (event.target.closest("button")) {
        return;
      }
      const move = { ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, 0.2], ArrowDown: [0, -0.2] }[event.key];
      if (!this.large) {
        if (event.key === "Enter" || move) {
          if (event.key === "Enter") {
            this.enlarge(this.axes[this.turn || 0]);
          } else {
            const step = move[0] - move[1] > 0 ? 1 : -1;
            this.point(this.turn === undefined ? 0 : (this.turn + step + this.axes.length) % this.axes.length);
          }
        } else {
          return;
        }
      } else if (event.key === "Escape") {
        this.leave();
      } else if (event.key === "+" || event.key === "=" || event.key === "-") {
        this.around(0.5, 0.5, event.key === "-" ? 1.25 : 0.8);
      } else if (event.key === "0") {
        this.all();
      } else if (move) {
        this.shift(...move);
      } else {
        return;
      }
      event.preventDefault();
      event.stopPropagation();
    }
  }

  function legend(axes) {
    const seen = new Map();
    for (const some of [...axes.lines, ...axes.points, ...axes.bands, ...axes.bars]) {
      if (some.label && !seen.has(some.label)) {
        seen.set(some.label, some.colour);
      }
    }
    return [...seen].map(([label, ink]) =>
      element("span", { style: "margin-right:10px" }, element("span", { style: `color:${colour(ink)}`, "aria-hidden": "true" }, "■ "), label)
    );
  }

  // A picture and its data, in `host`; where the data is of another version, the picture alone.
  function show(host, picture, data) {
    if (!data || data.version !== 1 || !Array.isArray(data.axes) || !data.axes.length) {
      host.replaceChildren(picture);
      return null;
    }
    return new LiveFigure(host, picture, data);
  }

  // In an exported page: each block of data follows its picture.
  function page() {
    document.querySelectorAll("script.aprlab-figure").forEach((block) => {
      const picture = block.parentElement.querySelector("img");
      if (picture) {
        const host = element("div", {});
        picture.before(host);
        show(host, picture, JSON.parse(block.textContent));
      }
    });
  }

  window.aprlabLive = { show, page };
})();
