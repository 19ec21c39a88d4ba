"use strict";
(() => {
  const {document: charts, roots} = JSON.parse(document.getElementById("charts").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // What of a chart is ink, line or ground; the page shines through the rest.
  const COLOURS = {
    Grid: {grid_line_color: "--grid"},
    Legend: {label_text_color: "--ink", background_fill_color: "--page"},
  };
  const AXIS = {
    axis_label_text_color: "--ink", major_label_text_color: "--ink", axis_line_color: "--line",
    major_tick_line_color: "--line", minor_tick_line_color: "--line",
  };

  function paint(model) {
    const wanted = COLOURS[model.type] ?? (model.type.endsWith("Axis") ? AXIS : null);
    if (wanted !== null)
      model.setv(Object.fromEntries(Object.entries(wanted).map(([name, role]) => [name, css(role)])));
    const [role] = model.tags;
    if (role === undefined)
      return;
    for (const name of ["line_color", "fill_color"])
      if (name in model.properties)
        model.setv({[name]: css(`--${role}`)});
  }

  const paintAll = () => Bokeh.documents.forEach((one) => one.all_models.forEach(paint));

  async function show() {
    await Bokeh.embed.embed_items({report: charts}, [{docid: "report", roots, root_ids: Object.keys(roots)}]);
    paintAll();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
    document.documentElement.dataset.charts = "shown";
  }
  show();
})();
