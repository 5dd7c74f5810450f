mod crash;
mod driver;
mod host;
mod model;
mod order;
