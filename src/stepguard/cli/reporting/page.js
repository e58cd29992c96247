"use strict";
// Without Plotly's bar of buttons, one of which would send the chart to a server.
for (const place of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(document.getElementById(place.dataset.chart).textContent);
  const options = {responsive: true, displayModeBar: false};
  Plotly.newPlot(place, chart.data, chart.layout, options);
}
