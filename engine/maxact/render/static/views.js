"use strict";
// The three pages: all taps, a tap, a channel. Each gives its elements; app.js puts them in place.

const SORTS = {
  __proto__: null,
  channel: ["channel number", (data, list, place) => data.shown[place], "up"],
  dead: ["dead first", (data, list, place) => Number(data.dead[data.shown[place]]), "down"],
  max: ["highest max", (data, list, place) => data.stats.max[data.shown[place]], "down"],
  mean: ["highest mean", (data, list, place) => data.stats.mean[data.shown[place]], "down"],
  std: ["highest std", (data, list, place) => data.stats.std[data.shown[place]], "down"],
  min: ["highest min", (data, list, place) => data.stats.min[data.shown[place]], "down"],
  active: ["most active", (data, list, place) => data.stats.active[data.shown[place]], "down"],
  score: ["best score in the list", (data, list, place) => list.best[place], "down"],
  label: ["most winners of one label", (data, list, place) => list.agreement[place], "down"],
};
const SHOWN = { all: "all channels", live: "without the dead", dead: "dead only", pictured: "with pictures" };
const STATISTICS = { max: "max", mean: "mean", std: "std", min: "min", active: "active" };
const PAGE = 60; // cards that are added at a time

const listName = (name) => {
  const [score, end] = name.split("/");
  return `${end === "top" ? "highest" : "lowest"} ${score}`;
};

/** Name and value pairs. */
const facts = (pairs) => h("dl.facts", {}, pairs.filter(([, value]) => value).map(([name, value]) =>
  h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "string" ? bdi(value) : value))));

const size = (pair) => (pair[0] === pair[1] ? `${pair[0]}` : `${pair[0]} × ${pair[1]}`);

function fieldFacts(tap) {
  const { field, global } = tap;
  const gated = global && field?.size.some((length, axis) => length < maxact.site.input[axis]); // squeeze-excite
  if (global && !gated) return [["field", "the whole image"]];
  const gate = gated ? ", gated by the whole image" : "";
  return field ? [["field", `${field.size.join(" × ")} px${gate}`], ["stride", `${size(field.stride)} px`]] : [];
}

function tapFacts(tap) {
  return [
    ["kind", tap.kind],
    ["layer", tap.layer === tap.name ? "" : tap.layer],
    ["channels", tap.channels.toLocaleString("en")],
    ["map", tap.map.join(" × ")],
    ...fieldFacts(tap),
    ["dead", tap.dead ? tap.dead.toLocaleString("en") : ""],
    ["unfit maps", tap.unfit ? tap.unfit.toLocaleString("en") : ""],
  ];
}

function indexView() {
  const { title, images, facts: about, taps } = maxact.site;
  const channels = taps.reduce((sum, tap) => sum + tap.channels, 0);
  const dead = taps.reduce((sum, tap) => sum + tap.dead, 0);
  const told = [counted(images, "image"), counted(taps.length, "tap"), counted(channels, "channel"), dead && `${dead.toLocaleString("en")} dead`];
  return [
    h("h1", {}, bdi(title)),
    h("p.lead", {}, told.filter(Boolean).join(" · ")),
    h("details.about", {}, h("summary", {}, "How it was made"), facts(about)),
    h("ol.taps", {}, taps.map((tap) => h("li", {}, tapRow(tap)))),
  ];
}

function tapRow(tap) {
  const some = [
    counted(tap.channels, "channel"),
    `map ${tap.map.join(" × ")}`,
    ...fieldFacts(tap).map(([name, value]) => `${name} ${value}`),
    tap.pictured < tap.shown && (tap.pictured ? `${tap.pictured.toLocaleString("en")} with pictures` : "no pictures"),
  ].filter(Boolean);
  const cover = tap.cover
    ? h("img.cover", { src: `img/${tap.file}/cover.webp?${maxact.stamp}`, alt: `Crops of ${tap.name}`, loading: "lazy", width: 80 * tap.cover, height: 80 })
    : h("span.cover.none", {}, "not projected");
  return h("a.tap", { href: link(tap), "data-step": true },
    h("span.name", {}, bdi(tap.name), h("small", {}, tap.kind)),
    h("span.some", {}, some.join(" · "),
      tap.dead ? h("span.badge", {}, `${tap.dead.toLocaleString("en")} dead`) : null,
      tap.unfit ? h("span.badge.warn", {}, counted(tap.unfit, "unfit map")) : null),
    cover);
}

/** The list that a route asks for: the first that has pictures where it asks for none. */
function chosenList(data, options) {
  const names = Object.keys(data.lists);
  const name = names.includes(options.list) ? options.list : names.find((each) => data.lists[each].pictured.includes(1)) ?? names[0];
  return [name, data.lists[name]];
}

const matches = (data, text) => {
  const wanted = text.trim().toLowerCase();
  return new Set(data.labels.flatMap((names, index) => (names.some((name) => name.toLowerCase().includes(wanted)) ? [index] : [])));
};

/** Which channels a route shows: those with pictures where it does not say and others that live have none. */
function showing(data, list, options) {
  if (options.show) return options.show;
  const bare = data.shown.some((channel, place) => !list.pictured[place] && !data.dead[channel]);
  return bare && list.pictured.includes(1) ? "pictured" : "all";
}

/** The places of the channels that a route shows, in its order. */
function ordered(data, list, options) {
  const show = showing(data, list, options);
  const labels = options.label.trim() ? matches(data, options.label) : null;
  const keep = (place) => {
    const dead = data.dead[data.shown[place]];
    if (show === "live" && dead) return false;
    if (show === "dead" && !dead) return false;
    if (show === "pictured" && !list.pictured[place]) return false;
    return !labels || list.labels[place].some((label) => labels.has(label));
  };
  const [, value, usual] = SORTS[options.sort] ?? SORTS.channel;
  const sign = (options.order || usual) === "up" ? 1 : -1;
  const places = data.shown.map((_, place) => place).filter(keep);
  const by = places.map((place) => [value(data, list, place), place]);
  const missing = (each) => each === null || each === undefined;
  by.sort(([a, x], [b, y]) => (missing(a) || missing(b) ? missing(a) - missing(b) || x - y : sign * (a - b) || x - y));
  return by.map(([, place]) => place);
}

const select = (name, label, values, chosen, change) => h("label.field", {}, h("span", {}, label),
  h("select", { "aria-label": label, name, onchange: (event) => change(event.target.value) },
    Object.entries(values).map(([value, text]) => h("option", { value, selected: value === chosen }, text))));

function tabs(tap, channel, data, name, options) {
  const names = Object.keys(data.lists);
  if (names.length < 2) return null;
  return h("nav.tabs", { "aria-label": "List" }, names.map((each) =>
    h("a", { href: link(tap, channel, { ...options, list: each }), "aria-current": each === name ? "true" : null }, listName(each))));
}

/** Presses "More" when it comes near. It is observed anew each time: an observer tells of changes only. */
const nearing = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    if (!isIntersecting) continue;
    nearing.unobserve(target);
    target.click();
    nearing.observe(target);
  }
}, { rootMargin: "800px" });

function tapView(tap, data, options, last) {
  const [name, list] = chosenList(data, options);
  const places = ordered(data, list, options);
  const go = (changed) => location.replace(link(tap, null, { ...options, ...changed }));
  const up = (options.order || (SORTS[options.sort] ?? SORTS.channel)[2]) === "up";
  const views = list.sheet ? Object.keys(list.sheet.blocks).filter((block) => block !== "map") : [];
  const view = views.includes(options.view) ? options.view : views[0];
  const known = h("datalist", { id: "labels" }, commonLabels(data, list).map((text) => h("option", { value: text })));
  const controls = h("form.controls", { onsubmit: (event) => event.preventDefault() },
    tabs(tap, null, data, name, options),
    views.length > 1 && select("view", "Pictures", Object.fromEntries(views.map((each) => [each, blockName(each)])), view, (value) => go({ view: value === views[0] ? "" : value })),
    h("div.sort", {},
      select("sort", "Sort", Object.fromEntries(Object.entries(SORTS).map(([key, [text]]) => [key, text])), options.sort, (value) => go({ sort: value, order: "" })),
      h("button", { type: "button", name: "order", title: "Turn the order around", "aria-label": `Order: ${up ? "ascending" : "descending"}`, onclick: () => go({ order: up ? "down" : "up" }) }, up ? "↑" : "↓")),
    select("show", "Show", SHOWN, showing(data, list, options), (value) => go({ show: value })),
    h("label.field", {}, h("span", {}, "Label"),
      h("input", { name: "label", type: "search", list: "labels", value: options.label, placeholder: "any", autocomplete: "off", onchange: (event) => go({ label: event.target.value }) })),
    known);
  const told = places.length === data.shown.length ? counted(places.length, "channel") : `${places.length.toLocaleString("en")} of ${counted(data.shown.length, "channel")}`;
  const grid = h("div.grid", {});
  const cards = (from, to) => places.slice(from, to).map((place) => card(tap, data, list, name, place, view, options));
  const until = Math.max(PAGE, places.indexOf(last) + 1 + PAGE / 2);
  grid.append(...cards(0, until));
  const more = h("button.more", { type: "button", hidden: places.length <= until }, "More");
  let added = until;
  const add = () => {
    grid.append(...cards(added, added + PAGE));
    added += PAGE;
    more.hidden = added >= places.length;
  };
  more.addEventListener("click", add);
  return [
    crumbs([["All taps", "#/"]], stepper(maxact.site.taps, tap.number, (each) => link(each), "tap")),
    h("h1", {}, bdi(tap.name)),
    facts(tapFacts(tap)),
    controls,
    h("p.count", { role: "status" }, told),
    places.length ? grid : h("p.empty", {}, "No channel is like that."),
    more,
  ];
}

function blockName(block) {
  const [kind, method] = block.split("/");
  return { crop: "crops", whole: "whole images" }[kind] ?? `projections, ${method}`;
}

/** The labels of a list, the most frequent first. */
function commonLabels(data, list) {
  const counts = new Array(data.words.length).fill(0);
  for (const labels of list.labels) for (const label of labels) if (label >= 0) counts[label] += 1;
  return data.words.map((_, index) => index).filter((index) => counts[index])
    .sort((a, b) => counts[b] - counts[a]).slice(0, 500).map((index) => data.words[index]);
}

function card(tap, data, list, name, place, view, options) {
  const channel = data.shown[place];
  const dead = data.dead[channel];
  const tiles = list.sheet?.blocks[view];
  let shown;
  if (list.pictured[place]) {
    shown = ruled(picture(list.sheet, spriteOf(tap, name, channel), view, null, `Channel ${channel}, ${blockName(view)}`, true), tiles);
  } else {
    shown = h("span.pic.none", {}, dead ? "dead" : "not projected");
  }
  const sort = options.sort in SORTS ? options.sort : "channel";
  const value = sort === "label" ? `${list.agreement[place]} alike` : sort === "score" ? number(list.best[place])
    : sort === "active" ? percent(data.stats.active[channel]) : number(data.stats[sort in STATISTICS ? sort : "max"][channel]);
  return h(dead ? "a.card.dead" : "a.card", { href: link(tap, channel, options), "data-step": true, "data-channel": channel },
    shown, h("span.caption", {}, h("b", {}, channel), dead ? h("span.badge", {}, "dead") : h("span", {}, value)));
}

function crumbs(parts, ...others) {
  return h("div.crumbs", {}, h("nav", { "aria-label": "Up" }, parts.map(([text, href]) => h("a", { href }, bdi(text)))), ...others);
}

/** Links to what comes before and after in a sequence. */
function stepper(all, at, href, what) {
  const to = (place, text, name) => (all[place] === undefined
    ? h("span.off", { "aria-hidden": "true" }, text)
    : h("a", { href: href(all[place]), rel: name, "aria-label": `${name === "prev" ? "Previous" : "Next"} ${what}` }, text));
  return h("nav.stepper", { "aria-label": `Other ${what}s` }, to(at - 1, "←", "prev"),
    h("span", {}, at < 0 ? "–" : `${(at + 1).toLocaleString("en")} / ${all.length.toLocaleString("en")}`), to(at + 1, "→", "next"));
}

function channelView(tap, data, winners, channel, options) {
  const [name, list] = chosenList(data, options);
  const place = data.place.get(channel);
  const places = ordered(data, list, options);
  const at = places.indexOf(place);
  const rows = winners[name];
  const source = list.pictured[place] ? spriteOf(tap, name, channel) : null;
  const dead = data.dead[channel];
  const title = `${tap.name} channel ${channel}`;
  const words = (winner) => (winner.label < 0 ? "" : data.words[winner.label]);
  const plates = source ? Object.keys(list.sheet.blocks).filter((block) => block === "crop" || block.startsWith("projection/")) : [];
  for (const near of [places[at - 1], places[at + 1]]) if (list.pictured[near]) new Image().src = spriteOf(tap, name, data.shown[near]);
  const body = h("div.channel", {},
    source ? h("div.plates", {}, plates.map((block) => plate(list.sheet, source, block, rows, title, words)))
      : h("p.empty", {}, dead ? "This channel is dead: over all images it is never above zero." : "This channel has not been projected: there are no pictures of it."),
    statistics(data, channel));
  return [
    crumbs([["All taps", "#/"], [tap.name, link(tap, null, options)]],
      stepper(places, at, (each) => link(tap, data.shown[each], options), "channel")),
    h("h1", {}, bdi(tap.name), " ", h("span.number", {}, channel), dead ? h("span.badge", {}, "dead") : null),
    tabs(tap, channel, data, name, options),
    body,
    h("div.heading", {}, h("h2", {}, "Winners"), source ? switches(list.sheet) : null),
    rows.length ? h("ol.winners", {}, rows.map((winner, rank) => winnerCard(tap, data, list, source, winner, rank, title, options)))
      : h("p.empty", {}, "No image is in this list."),
  ];
}

/** The tiles of a block, each a button that leads to its winner. */
function plate(sheet, source, block, rows, title, words) {
  const tiles = sheet.blocks[block];
  const kind = block === "crop" ? "crop" : "projection";
  const buttons = rows.slice(0, tiles.count).map((winner, rank) => {
    const alt = `${title}, ${kind} ${rank + 1}: ${words(winner)}`;
    if (!winner.box) return h("span.pic.none", { style: { "aspect-ratio": `${tiles.width} / ${tiles.height}` } }, "missing");
    const frame = kind === "crop" ? cropOf(sheet, source, rank, alt) : picture(sheet, source, block, rank, alt);
    if (tiles.width < 64 && kind === "projection") frame.classList.add("coarse");
    const twins = (on) => () => document.querySelectorAll(`[data-rank="${rank}"]`).forEach((each) => each.classList.toggle("twin", on));
    return h("button.tile", {
      type: "button", "data-rank": rank, title: `#${rank + 1} ${number(winner.score)} ${words(winner)}`,
      onclick: () => showWinner(rank), onmouseenter: twins(true), onmouseleave: twins(false), onfocus: twins(true), onblur: twins(false),
    }, frame);
  });
  return h("figure.plate", {}, h("div.tiles", { style: { "--across": tiles.across } }, buttons),
    h("figcaption", {}, kind === "crop" ? `Crops${sheet.window ? ", with what lies around the field" : ""}`
      : `Projections, ${block.split("/")[1]}${sheet.window ? ": the field alone" : ""}`));
}

function showWinner(rank) {
  const card = document.getElementById(`winner-${rank}`);
  card.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  card.focus({ preventScroll: true });
}

const SWITCHES = { boxes: true, maps: false }; // what is drawn over whole images; stays from channel to channel

function toggle(name) {
  SWITCHES[name] = !SWITCHES[name];
  document.body.classList.toggle(`show-${name}`, SWITCHES[name]);
  document.querySelectorAll(`button[name="${name}"]`).forEach((each) => each.setAttribute("aria-pressed", SWITCHES[name]));
}

function switches(sheet) {
  const button = (name, text, ...key) => h("button.switch", { type: "button", name, "aria-pressed": String(SWITCHES[name]), onclick: () => toggle(name) }, ...key, text);
  return h("div.switches", {},
    button("boxes", "Boxes", h("i.key.field", {}), h("i.key.focus", {})),
    sheet.blocks.map ? button("maps", "Activation") : null,
    h("span.legend", {}, "yellow: field, blue: focus"));
}

function winnerCard(tap, data, list, source, winner, rank, title, options) {
  const [code, words] = winner.label < 0 ? [""] : data.labels[winner.label];
  const alt = `${title}, image ${rank + 1}: ${words ?? code}`;
  const whole = source && winner.box ? wholeOf(list.sheet, source, rank, winner, alt) : h("span.pic.none", {}, "no picture");
  const place = winner.row < 0 ? "" : `row ${winner.row}, column ${winner.column}`;
  return h("li.winner", { id: `winner-${rank}`, tabindex: "-1", "data-rank": rank },
    whole,
    h("div.told", {},
      h("p.score", {}, h("span", {}, `#${rank + 1}`), h("b", {}, number(winner.score))),
      code || words ? h("p", {}, h("a.label", { href: link(tap, null, { ...options, label: words ?? code }), title: "Channels with this label" }, h("bdi", {}, words ?? code))) : null,
      h("p.key", {}, bdi(winner.key)),
      h("p.small", {}, [`image ${winner.number}`, place].filter(Boolean).join(" · "))));
}

function statistics(data, channel) {
  const rows = Object.entries(STATISTICS).map(([name, text]) => {
    const values = data.stats[name];
    const value = values[channel];
    const shown = name === "active" ? percent(value) : number(value);
    const finite = values.filter((each) => each !== null);
    const above = value === null ? "" : `${(finite.filter((each) => each > value).length + 1).toLocaleString("en")} of ${finite.length.toLocaleString("en")}`;
    return h("tr", {}, h("th", { scope: "row" }, text), h("td", {}, shown),
      h("td", {}, histogram(values, value, `${text} of all channels; this one is ${above}`)), h("td.rank", {}, above));
  });
  return h("section.statistics", {}, h("h2", {}, "Among the tap's channels"),
    h("table", {}, h("thead", {}, h("tr", {}, ["", "value", "all channels", "rank"].map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, rows)),
    h("p.small", {}, `over ${counted(data.count[channel], "value")}; active: the share above zero`));
}
