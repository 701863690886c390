// Shows HTML; an element with data-key is a button that tells its key. Those inside an element with data-map share one Tab stop,
// and arrow keys go from one to the next as they lie on the screen. `currents` are the keys to be marked; where none of
// them can be seen the first is scrolled into view. The HTML itself is only sent again when it changes, so marks cost nothing.
function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "aprlab-clickable";
  box.dataset.lmSuppressShortcuts = "true"; // keys pressed here are not JupyterLab's
  el.append(box);

  const stops = new Map(); // map -> key of its one element that Tab reaches
  const keys = (map) => [...map.querySelectorAll("[data-key]")];
  const find = (key) => box.querySelector(`[data-key="${CSS.escape(key)}"]`);

  // `anew`: only what was not marked before is worth scrolling to, else taking back one choice would run away to another.
  function mark(anew) {
    const before = new Set(box.querySelectorAll(".aprlab-current"));
    for (const old of before) {
      old.classList.remove("aprlab-current");
      old.removeAttribute("aria-current");
    }
    const found = model.get("currents").map(find).filter(Boolean);
    for (const element of found) {
      element.classList.add("aprlab-current");
      element.setAttribute("aria-current", "true");
    }
    const sought = anew ? found.filter((element) => !before.has(element)) : found;
    const scroller = sought[0]?.closest("[data-scroll]");
    if (!scroller) return;
    const outer = scroller.getBoundingClientRect();
    const seen = (inner) => inner.top >= outer.top && inner.bottom <= outer.bottom;
    const places = sought.map((element) => element.getBoundingClientRect());
    if (!places.some(seen)) scroller.scrollTop += places[0].top - outer.top - (outer.height - places[0].height) / 2;
  }

  function draw() {
    const places = new Map();
    for (const element of box.querySelectorAll("[data-scroll]")) {
      places.set(element.dataset.scroll, [element.scrollTop, element.scrollLeft]);
    }
    const open = [...box.querySelectorAll("details[open][id]")].map((element) => element.id);
    const focused = box.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    box.innerHTML = model.get("html");
    for (const element of box.querySelectorAll("[data-key]")) {
      element.tabIndex = element.closest("[data-map]") ? -1 : 0;
      if (!element.hasAttribute("role")) element.setAttribute("role", "button");
    }
    for (const map of box.querySelectorAll("[data-map]")) {
      const stop = map.querySelector(`[data-key="${CSS.escape(stops.get(map.dataset.map) ?? "")}"]`) ?? keys(map)[0];
      if (stop) stop.tabIndex = 0;
    }
    for (const id of open) box.querySelector(`details[id="${CSS.escape(id)}"]`)?.setAttribute("open", "");
    for (const element of box.querySelectorAll("[data-scroll]")) {
      const place = places.get(element.dataset.scroll);
      if (place) [element.scrollTop, element.scrollLeft] = place;
    }
    mark(false);
    if (focused !== undefined) find(focused)?.focus({ preventScroll: true });
  }

  function tell(event) {
    const element = event.target.closest("[data-key]");
    if (element && box.contains(element)) model.send({ key: element.dataset.key });
  }

  // The element to go to from `here`: in its row the next one, in other rows the nearest below or above; null at the edge.
  function neighbour(map, here, arrow) {
    const all = keys(map);
    if (arrow === "Home" || arrow === "End") return all.at(arrow === "Home" ? 0 : -1);
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[arrow];
    const middle = (element) => {
      const place = element.getBoundingClientRect();
      return [place.left + place.width / 2, place.top + place.height / 2, place.height / 2];
    };
    const [x, y, half] = middle(here);
    const along = (a, b) => (dx ? dx * (a - x) : dy * (b - y));
    let best = null, least = Infinity;
    for (const element of all) {
      const [a, b] = middle(element);
      const ahead = along(a, b);
      const aside = dx ? Math.abs(b - y) : Math.abs(a - x);
      if (ahead <= (dx ? 1 : half) || (dx && aside > half)) continue;
      const far = dx ? ahead : ahead * 1e4 + aside; // the next row first, and in it the nearest
      if (far < least) [best, least] = [element, far];
    }
    return best;
  }

  function stand(element) {
    const map = element?.closest("[data-map]");
    if (!map || !box.contains(map)) return;
    for (const other of keys(map)) other.tabIndex = -1;
    element.tabIndex = 0;
    stops.set(map.dataset.map, element.dataset.key);
  }

  function press(event) {
    const map = event.target.closest?.("[data-map]");
    if (map && box.contains(map) && /^(Arrow|Home$|End$)/.test(event.key) && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      event.stopPropagation();
      neighbour(map, event.target.closest("[data-key]"), event.key)?.focus();
      return;
    }
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.stopPropagation();
      tell(event);
    }
  }

  const again = () => mark(true);
  box.addEventListener("click", tell);
  box.addEventListener("keydown", press);
  box.addEventListener("focusin", (event) => stand(event.target.closest("[data-key]")));
  model.on("change:html", draw);
  model.on("change:currents", again);
  draw();
  const placed = new ResizeObserver(() => { // at first drawing nothing has a place yet
    if (!box.offsetHeight) return;
    placed.disconnect();
    mark(false);
  });
  placed.observe(box);
  return () => {
    placed.disconnect();
    model.off("change:html", draw);
    model.off("change:currents", again);
  };
}

export default { render };
