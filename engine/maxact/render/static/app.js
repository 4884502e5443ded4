"use strict";
// Routes become pages; search, keys and the theme.

const main = document.getElementById("main");
const search = document.getElementById("search");
const found = document.getElementById("found");
const help = document.getElementById("help");
const lastOf = new Map(); // tap -> the channel that was open last
let route = {};
let drawn = 0; // counts pages, so that a slow one does not replace a later one

async function draw() {
  const before = route;
  const turn = ++drawn;
  route = readRoute();
  const { tap, channel, options, missing } = route;
  closeFound();
  const waiting = setTimeout(() => main.classList.add("waiting"), 150);
  let page;
  try {
    if (missing) throw new Error(`There is no tap ${missing} in this gallery.`);
    if (!tap) {
      page = indexView();
    } else {
      const data = await maxact.loadTap(tap);
      if (channel === null) {
        page = tapView(tap, data, options, data.place.get(lastOf.get(tap.number)));
      } else {
        const place = data.place.get(channel);
        if (place === undefined) throw new Error(`${tap.name} has no channel ${channel} in this gallery.`);
        page = channelView(tap, data, await maxact.loadWinners(tap, place), channel, options);
        lastOf.set(tap.number, channel);
      }
    }
  } catch (error) {
    page = [crumbs([["All taps", "#/"]]), h("p.empty", {}, bdi(error.message))];
  }
  clearTimeout(waiting);
  if (turn !== drawn) return;
  main.classList.remove("waiting");
  const control = main.contains(document.activeElement) ? document.activeElement.name : "";
  nearing.disconnect();
  main.replaceChildren(...page.filter(Boolean));
  main.querySelectorAll(".more").forEach((more) => nearing.observe(more));
  const title = maxact.site.title;
  const here = tap ? [channel, tap.name].filter((part) => part !== null).join(" · ") : "";
  document.title = here ? `${here} · ${title}` : `${title} · maxact`;
  document.getElementById("said").textContent = document.title;
  main.dataset.ready = location.hash; // tests wait for it
  settle(before, control);
}

/** Where the page stands, and what has the focus: on the way up, at what one came from. */
function settle(before, control) {
  const { tap, channel } = route;
  const samePage = before.tap === tap && (before.channel === null) === (channel === null);
  if (samePage && control) main.querySelector(`[name="${control}"]`)?.focus({ preventScroll: true });
  if (samePage) return;
  if (before.tap && before.channel !== null && before.tap === tap && channel === null) return focusOn(`[data-channel="${before.channel}"]`);
  if (before.tap && !tap) return focusOn(`[href="${CSS.escape(link(before.tap))}"]`);
  scrollTo(0, 0);
  if (before.options) main.focus({ preventScroll: true });
}

function focusOn(selector) {
  const element = main.querySelector(selector);
  if (!element) return scrollTo(0, 0);
  element.scrollIntoView({ block: "center" });
  element.focus({ preventScroll: true });
}

// Search: "layer3.0.bn2 171" is the tap and its channel; every other word must be in the tap's name, layer or kind.

function look(text) {
  const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const channel = words.length > 1 && /^#?[0-9]+$/.test(words.at(-1)) ? Number(words.pop().replace("#", "")) : null;
  const alone = channel === null && words.length === 1 && /^[0-9]+$/.test(words[0]) && route.tap ? Number(words[0]) : null;
  const rate = (tap) => {
    const name = tap.name.toLowerCase();
    const all = `${name} ${tap.layer} ${tap.kind}`.toLowerCase();
    if (!words.every((word) => all.includes(word))) return -1;
    return words.reduce((sum, word) => sum + (name === word ? 4 : name.startsWith(word) ? 2 : name.includes(word) ? 1 : 0), 0);
  };
  const hits = maxact.site.taps.map((tap) => [rate(tap), tap]).filter(([points, tap]) => points >= 0 && (channel === null || channel < tap.channels));
  hits.sort(([a, x], [b, y]) => b - a || x.number - y.number);
  const shown = hits.slice(0, 12).map(([, tap]) => [tap, channel]);
  if (alone !== null && alone < route.tap.channels) shown.unshift([route.tap, alone]);
  return shown;
}

function showFound() {
  const hits = search.value.trim() ? look(search.value) : [];
  found.replaceChildren(...hits.map(([tap, channel], index) =>
    h("li", { role: "option", id: `found-${index}`, "aria-selected": String(index === 0), "data-href": link(tap, channel),
      onmousedown: (event) => { event.preventDefault(); open(index); } },
      bdi(tap.name), channel === null ? h("small", {}, `${tap.kind}, ${counted(tap.channels, "channel")}`) : h("b", {}, channel))));
  if (search.value.trim() && !hits.length) found.append(h("li.none", {}, "Nothing is called that."));
  found.hidden = !search.value.trim();
  search.setAttribute("aria-expanded", String(!found.hidden));
  mark(0);
}

function mark(index) {
  const options = [...found.querySelectorAll("[role=option]")];
  options.forEach((option, at) => option.setAttribute("aria-selected", String(at === index)));
  if (options[index]) {
    search.setAttribute("aria-activedescendant", options[index].id);
    options[index].scrollIntoView({ block: "nearest" });
  } else search.removeAttribute("aria-activedescendant");
}

function open(index) {
  const option = document.getElementById(`found-${index}`);
  if (!option) return;
  search.value = "";
  search.blur();
  closeFound();
  location.hash = option.dataset.href;
}

function closeFound() {
  found.hidden = true;
  search.setAttribute("aria-expanded", "false");
}

search.addEventListener("input", showFound);
search.addEventListener("focus", () => search.value && showFound());
search.addEventListener("blur", closeFound);
search.addEventListener("keydown", (event) => {
  const options = [...found.querySelectorAll("[role=option]")];
  const at = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (options.length) mark((at + (event.key === "ArrowDown" ? 1 : -1) + options.length) % options.length);
  } else if (event.key === "Enter") {
    open(Math.max(at, 0));
  } else if (event.key === "Escape") {
    search.value = "";
    search.blur();
  } else return;
  event.stopPropagation();
});

// Keys

/** Moves the focus by `steps` among what can be stepped through on the page. */
function step(steps) {
  const all = [...main.querySelectorAll("[data-step]")];
  const at = all.indexOf(document.activeElement);
  const next = all[at < 0 ? 0 : Math.min(Math.max(at + steps, 0), all.length - 1)];
  if (!next) return;
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
}

function columns() {
  const grid = main.querySelector(".grid");
  return grid ? getComputedStyle(grid).gridTemplateColumns.split(" ").length : 1;
}

const MOVES = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1 };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const writing = event.target.closest?.("input, select, textarea");
  if (event.key === "Escape" && (writing || route.tap)) {
    if (writing) writing.blur();
    else location.hash = route.channel === null ? "#/" : link(route.tap, null, route.options);
    event.preventDefault();
    return;
  }
  if (writing) return;
  const onChannel = route.tap && route.channel !== null;
  if (event.key === "/") search.focus();
  else if (event.key === "?") help.showModal();
  else if (event.key in MOVES) {
    if (onChannel) main.querySelector(`.stepper [rel=${MOVES[event.key] < 0 ? "prev" : "next"}]`)?.click();
    else step(MOVES[event.key]);
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !onChannel) {
    step(event.key === "ArrowDown" ? columns() : -columns());
  } else if (onChannel && event.key === "b") toggle("boxes");
  else if (onChannel && event.key === "m") toggle("maps");
  else return;
  event.preventDefault();
});

document.getElementById("keys").addEventListener("click", () => help.showModal());
help.addEventListener("click", (event) => event.target === help && help.close());

// Light and dark: as the system has it, until it is chosen here

const dark = matchMedia("(prefers-color-scheme: dark)");
const stored = () => { try { return localStorage.getItem("maxact-theme"); } catch { return null; } };
document.documentElement.dataset.theme = stored() ?? "";
document.getElementById("theme").addEventListener("click", () => {
  const theme = (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("maxact-theme", theme); } catch { /* a browser that keeps nothing for files */ }
});

document.body.classList.toggle("show-boxes", SWITCHES.boxes);
window.addEventListener("hashchange", draw);
draw();
