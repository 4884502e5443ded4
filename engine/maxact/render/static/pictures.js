"use strict";
// Parts of a sprite, and marks over them.

const spriteOf = (tap, list, channel) => `img/${tap.file}/${list.replace("/", "-")}/${channel}.webp?${maxact.stamp}`;

/** A frame behind which a sprite is moved so that it shows one block of tiles, or one tile of it. */
function picture(sheet, source, block, rank, alt, lazy = false) {
  const tiles = sheet.blocks[block];
  const step = [tiles.width + 2 * sheet.edge, tiles.height + 2 * sheet.edge];
  const rows = Math.ceil(tiles.count / tiles.across);
  let [x, y, width, height] = [tiles.x, 0, tiles.across * step[0], rows * step[1]];
  if (rank !== null) {
    x += (rank % tiles.across) * step[0] + sheet.edge;
    y += Math.floor(rank / tiles.across) * step[1] + sheet.edge;
    [width, height] = [tiles.width, tiles.height];
  }
  const style = {
    width: `${(100 * sheet.size[1]) / width}%`,
    height: `${(100 * sheet.size[0]) / height}%`,
    left: `${(-100 * x) / width}%`,
    top: `${(-100 * y) / height}%`,
  };
  const image = h("img", { alt, style, decoding: "async", loading: lazy ? "lazy" : null, src: source, draggable: "false" });
  image.addEventListener("error", () => frame.classList.add("lost"));
  const frame = h("span.pic", { style: { "aspect-ratio": `${width} / ${height}` } }, image);
  return frame;
}

/** Lines between the tiles of a block, in the colour of the page. */
function ruled(frame, tiles) {
  frame.classList.add("ruled");
  frame.style.setProperty("--across", tiles.across);
  frame.style.setProperty("--down", Math.ceil(tiles.count / tiles.across));
  return frame;
}

/** Boxes (y0, x0, y1, x1) over a picture that shows `size` (height, width) pixels: class -> box. */
function outline(size, boxes) {
  const marks = svg("svg", { viewBox: `0 0 ${size[1]} ${size[0]}`, class: "marks", "aria-hidden": "true" });
  for (const [kind, [y0, x0, y1, x1]] of boxes) {
    const place = { x: x0, y: y0, width: Math.max(x1 - x0, 0), height: Math.max(y1 - y0, 0) };
    marks.append(svg("rect", { ...place, class: "halo" }), svg("rect", { ...place, class: kind }));
  }
  return marks;
}

/** A crop; a small field is outlined in what lies around it. */
function cropOf(sheet, source, rank, alt) {
  const frame = picture(sheet, source, "crop", rank, alt);
  if (sheet.window) {
    const [y, x] = sheet.window.map((length, axis) => (length - sheet.field[axis]) / 2);
    frame.append(outline(sheet.window, [["field", [y, x, y + sheet.field[0], x + sheet.field[1]]]]));
  }
  return frame;
}

/** A whole image with its field and its focus, and the activation map over it. */
function wholeOf(sheet, source, rank, winner, alt) {
  const frame = picture(sheet, source, "whole", rank, alt);
  if (sheet.blocks.map) {
    const map = picture(sheet, source, "map", rank, "");
    map.classList.add("map");
    frame.append(map);
  }
  frame.append(outline(sheet.whole, [["field", winner.box], ["focus", winner.focus]]));
  return frame;
}

/** How many of the values fall into each of some equal ranges, the one that holds `marked` apart. */
function histogram(values, marked, label) {
  const [width, height, bins] = [160, 30, 32];
  const finite = values.filter((value) => value !== null);
  const low = Math.min(...finite), high = Math.max(...finite);
  const bin = (value) => (high > low ? Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins)) : 0);
  const counts = new Array(bins).fill(0);
  for (const value of finite) counts[bin(value)] += 1;
  const most = Math.max(1, ...counts);
  const bars = counts.map((count, index) => {
    const tall = count ? Math.max(1.5, (count / most) * height) : 0;
    return svg("rect", { x: (index * width) / bins + 0.5, y: height - tall, width: width / bins - 1, height: tall });
  });
  const graph = svg("svg", { viewBox: `0 0 ${width} ${height + 6}`, class: "histogram", role: "img", "aria-label": label }, ...bars);
  if (marked !== null) {
    bars[bin(marked)].classList.add("here");
    const x = ((bin(marked) + 0.5) * width) / bins;
    graph.append(svg("path", { d: `M${x - 4} ${height + 6}L${x} ${height + 1}L${x + 4} ${height + 6}Z`, class: "here" }));
  }
  return graph;
}
