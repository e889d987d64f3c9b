// What a page shows, as JSON text: its figures with the boxes of their shapes and words, its tables, its data.
(() => {
  const SLACK = 1.5; // pixels by which boxes of glyphs may touch or reach over an edge
  document.querySelectorAll("details").forEach((element) => { element.open = true; });
  const words = (element) => element.textContent.trim();
  const area = (box) => box.width * box.height;
  const figure = (svg) => {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((item) => [words(item), item.getBoundingClientRect()]);
    const outside = texts.filter(([, box]) =>
      area(box) === 0 || box.left < frame.left - SLACK || box.right > frame.right + SLACK ||
      box.top < frame.top - SLACK || box.bottom > frame.bottom + SLACK);
    const overlaps = [];
    texts.forEach(([name, a], index) => texts.slice(index + 1).forEach(([other, b]) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > SLACK && high > SLACK) overlaps.push([name, other]);
    }));
    const shapes = [...svg.querySelectorAll("rect, circle, polyline, line")].filter((item) => {
      const box = item.getBoundingClientRect();
      return (box.width > 0 || box.height > 0) && box.left >= frame.left - SLACK && box.right <= frame.right + SLACK &&
        box.top >= frame.top - SLACK && box.bottom <= frame.bottom + SLACK &&
        (item.tagName === "line" || item.tagName === "polyline" || area(box) > 0);
    });
    const stacks = new Map();
    const dots = {};
    svg.querySelectorAll("rect > title").forEach((title) => {
      const box = title.parentElement.getBoundingClientRect();
      const place = Math.round(box.left * 10);
      stacks.set(place, (stacks.get(place) || 0) + box.height);
    });
    svg.querySelectorAll("circle > title").forEach((title) => {
      const name = words(title).split(": ")[0];
      (dots[name] = dots[name] || []).push(words(title));
    });
    return {
      section: svg.closest("section").id, width: frame.width, height: frame.height, shapes: shapes.length,
      texts: texts.length, titles: svg.querySelectorAll("title").length, outside: outside.map(([name]) => name),
      overlaps, stacks: [...stacks.values()], dots,
    };
  };
  const tables = {};
  document.querySelectorAll("section").forEach((section) => {
    tables[section.id] = [...section.querySelectorAll("table")].map((table) =>
      [...table.rows].map((row) => [...row.cells].map(words)));
  });
  const data = document.getElementById("data");
  return JSON.stringify({
    title: document.title, sections: [...document.querySelectorAll("section")].map((section) => section.id),
    figures: [...document.querySelectorAll("svg")].map(figure), tables,
    scrollWidth: document.documentElement.scrollWidth, scripts: document.querySelectorAll("script").length,
    images: document.querySelectorAll("img").length, data: data ? JSON.parse(data.textContent) : null,
  });
})()
