mod crash;
mod driver;
mod host;
mod kill;
mod model;
mod order;
