"use strict";
// What everything else rests on: data files, routes, elements, numbers as text.
// Names, keys and labels come from files that anybody may have made: they become text nodes, never HTML.

const maxact = (() => {
  const stamp = document.body.dataset.stamp;
  const got = new Map(); // file -> its content, as it registers itself
  const asked = new Map(); // file -> a promise of it
  let index = null;

  /** Runs a data file and gives what it registered. Scripts, because file:// refuses to fetch. */
  function load(file, key) {
    if (!asked.has(key)) {
      asked.set(key, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `data/${file}.js?${stamp}`;
        script.onload = () => { script.remove(); resolve(got.get(key)); };
        script.onerror = () => {
          script.remove();
          asked.delete(key); // ask again next time
          reject(new Error(`data/${file}.js cannot be read`));
        };
        document.head.append(script);
      }));
    }
    return asked.get(key);
  }

  return {
    stamp,
    set: (value) => { index = value; index.taps.forEach((tap, number) => { tap.number = number; }); },
    index: (value) => maxact.set(value),
    tap: (number, value) => got.set(`${number}`, value),
    part: (number, part, value) => got.set(`${number}-${part}`, value),
    get site() { return index; },
    /** A tap's statistics and labels. */
    async loadTap(tap) {
      const data = await load(tap.file, `${tap.number}`);
      if (!data.prepared) prepare(tap, data);
      return data;
    },
    /** The winners of the channel at a place among those shown: list -> rows, and the images they name. */
    async loadWinners(tap, place) {
      const part = Math.floor(place / index.part);
      const data = await load(`${tap.file}-${part}`, `${tap.number}-${part}`);
      const lists = {};
      for (const [name, rows] of Object.entries(data.lists)) {
        lists[name] = rows[place - part * index.part].map((row) => winner(row, data.images));
      }
      return lists;
    },
  };

  function winner([place, label, score, row, column, box, focus, crop], images) {
    const [number, key] = images[place];
    return { number, key, label, score, row, column, box, focus, crop };
  }

  function prepare(tap, data) {
    data.prepared = true;
    data.shown ??= Array.from({ length: tap.channels }, (_, channel) => channel);
    data.place = new Map(data.shown.map((channel, place) => [channel, place]));
    data.dead = data.stats.max.map((value) => !(value > 0));
    data.words = data.labels.map(([code, words]) => words ?? code);
    // how many of a channel's winners bear its most frequent label
    for (const list of Object.values(data.lists)) {
      list.agreement = list.labels.map((labels) => {
        const counts = new Map();
        for (const label of labels) if (label >= 0) counts.set(label, (counts.get(label) ?? 0) + 1);
        return Math.max(0, ...counts.values());
      });
    }
  }
})();

/** An element: h("a.card", { href, onclick, style: {...} }, ...children). Strings become text. */
function h(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function svg(tag, properties = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Text from a data set: set apart, so that its direction stays its own. */
const bdi = (text, kind = "bdi") => h(kind, { title: text }, text);

const counted = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(2).replace("-", "−").replace("e+", "e");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

const percent = (value) => (value === null ? "–" : `${Number((100 * value).toPrecision(3))} %`);

// Routes: #/  #/tap/NAME?sort=…  #/tap/NAME/CHANNEL?list=…

const DEFAULTS = { list: "", sort: "channel", order: "", show: "", label: "", view: "" };

function readRoute() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  const given = Object.fromEntries(new URLSearchParams(query));
  const options = Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, given[name] ?? value]));
  if (parts[0] !== "tap" || parts.length < 2) return { options };
  const tap = maxact.site.taps.find((each) => each.name === parts[1]);
  const channel = parts.length > 2 && /^[0-9]+$/.test(parts[2]) ? Number(parts[2]) : null;
  return { options, tap, missing: tap ? null : parts[1], channel };
}

function link(tap, channel = null, options = {}) {
  if (!tap) return "#/";
  const name = encodeURIComponent(tap.name).replaceAll("%3A", ":");
  const query = new URLSearchParams(Object.entries(options).filter(([key, value]) => value !== DEFAULTS[key]));
  const text = query.toString().replaceAll("%2F", "/");
  return `#/tap/${name}${channel === null ? "" : `/${channel}`}${text ? `?${text}` : ""}`;
}
